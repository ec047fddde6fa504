"""Frames of a video file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from transformers.video_utils import VideoMetadata


def read(
    path: str, most: int, fps: float | None = None, start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode frames at equal distances, the first and the last among them.

    Args:
        path: The file.
        most: Most frames that are taken; all of a shorter video.
        fps: Frames to take per second, at most `most`.
        start: Where the part that is wanted begins, in seconds; by default at the beginning.
        end: Where it ends; by default at the end.

    Returns:
        Frames (T, height, width, 3), uint8, and what transformers' video processors want to know of them.

    Raises:
        ValueError: If the file has no frames.
    """
    with av.open(path) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate)
        total = stream.frames or sum(packet.size > 0 for packet in file.demux(stream))  # some files don't tell
        if total == 0:
            raise ValueError(f"{path} has no frames; give another video")
        first = 0 if start is None else min(int(start * rate), total - 1)
        last = total - 1 if end is None else max(first, min(int(end * rate), total - 1))
        length = last - first + 1
        count = min(most, length) if fps is None else min(most, length, max(1, round(length / rate * fps)))
        wanted = np.linspace(first, last, count).round().astype(int).tolist()
        file.seek(0)
        frames = {index: frame.to_ndarray(format="rgb24") for index, frame in _until(file, wanted)}
    missing = [index for index in wanted if index not in frames]
    if missing:
        raise ValueError(f"{path} says it has {total} frames, and number {missing[0]} can't be decoded")
    # Processors take the share of frames that were taken for the speed of the video, so a part counts as a whole one.
    metadata = VideoMetadata(
        total_num_frames=length, fps=rate, duration=length / rate, video_backend="pyav", frames_indices=wanted
    )
    return np.stack([frames[index] for index in wanted]), metadata


def _until(file: Any, wanted: list[int]) -> Iterator[tuple[int, Any]]:
    """The wanted frames with their numbers; decoding ends with the last of them."""
    for index, frame in enumerate(file.decode(video=0)):
        if index in wanted:
            yield index, frame
        if index >= wanted[-1]:
            return

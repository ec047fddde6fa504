"""What the tiny LLaVA is trained on: dense targets for the tower, words for projected patches, answers."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from eval.canvas.batches import IGNORE, Batch
from eval.canvas.data import GRID, KINDS, MAX_ITEMS

WEIGHTS = {  # of the tower's losses
    "dense_label": 1.0,
    "dense_is_item": 1.0,
    "dense_quadrant": 0.5,
    "dense_centre": 2.0,
    "dense_is_centre": 0.5,
    "dense_box": 0.5,
    "cls_present": 1.0,
    "cls_count": 0.2,
}


class Heads(nn.Module):
    """Linear readouts that exist only during training.

    On the patch features that the projector reads: whether an item shows, its label, quadrant, centre and box, and
    whether its centre is here.
    On the tower's pooled CLS: which labels are present, and how many items.
    """

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.is_item = nn.Linear(width, 1)
        self.label = nn.Linear(width, num_labels)
        self.quadrant = nn.Linear(width, 4)
        self.centre = nn.Linear(width, 2)
        self.is_centre = nn.Linear(width, 1)
        self.box = nn.Linear(width, 4 * GRID)
        self.present = nn.Linear(width, num_labels)
        self.count = nn.Linear(width, MAX_ITEMS)


def tower_features(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch features that the projector reads, (B, N, C), and the pooled CLS of the last layer, (B, C).

    Crops are embedded at their true positions: the tower gets their position numbers and size for this one call.
    """
    embeddings = model.model.vision_tower.embeddings
    positions, size = embeddings.position_ids, embeddings.image_size
    embeddings.position_ids = F.pad(batch.patch_index + 1, (1, 0))  # CLS has position 0
    embeddings.image_size = batch.pixels.shape[-1]
    try:
        output = model.model.vision_tower(batch.pixels, output_hidden_states=True)
    finally:
        embeddings.position_ids, embeddings.image_size = positions, size
    return output.hidden_states[model.config.vision_feature_layer][:, 1:], output.pooler_output


def tower_loss(heads: Heads, patches: torch.Tensor, cls: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict]:
    """Dense loss on the patches plus presence and count on CLS, and their accuracies."""
    shown = batch.patch_quadrant != IGNORE
    sure = batch.patch_label != IGNORE
    counted = batch.count != IGNORE  # crops are not
    label, box = heads.label(patches[shown]), heads.box(patches[shown]).unflatten(-1, (4, GRID))
    present, count = heads.present(cls), heads.count(cls)
    binary = F.binary_cross_entropy_with_logits
    losses = {
        "dense_label": F.cross_entropy(label, batch.patch_label[shown]),
        "dense_is_item": binary(heads.is_item(patches[sure])[..., 0], shown[sure].float()),
        "dense_quadrant": F.cross_entropy(heads.quadrant(patches[shown]), batch.patch_quadrant[shown]),
        "dense_centre": F.smooth_l1_loss(heads.centre(patches), batch.patch_centre, beta=0.1),
        "dense_is_centre": binary(
            heads.is_centre(patches)[..., 0], batch.patch_is_centre, pos_weight=torch.tensor(10.0)
        ),
        "dense_box": F.cross_entropy(box.flatten(0, 1), batch.patch_box[shown].flatten()),
        "cls_present": binary(present, batch.present),
        "cls_count": F.cross_entropy(count[counted], batch.count[counted]) if counted.any() else torch.zeros(()),
    }
    right = {
        "dense_label_acc": label.argmax(-1) == batch.patch_label[shown],
        "dense_box_acc": box.argmax(-1) == batch.patch_box[shown],
        "cls_present_acc": (present > 0) == (batch.present > 0),
        "cls_count_acc": count.argmax(-1) == batch.count,
    }
    figures = {name: loss.item() for name, loss in losses.items()}
    figures |= {name: hits.float().mean().item() for name, hits in right.items()}
    return sum(WEIGHTS[name] * loss for name, loss in losses.items()), figures


def alignment_loss(
    projected: torch.Tensor, embedding: torch.Tensor, batch: Batch, label_ids: torch.Tensor, quadrant_ids: torch.Tensor
) -> torch.Tensor:
    """Make a projected patch that shows an item resemble the words for its name and its quadrant.

    Args:
        projected: Projector output, (B, N, D). embedding: Word embeddings, (V, D).
        label_ids: Token id per label. quadrant_ids: Token ids of the four quadrant words.
    """
    shown = batch.patch_quadrant != IGNORE
    tokens = F.rms_norm(projected[shown], projected.shape[-1:])
    scores = (tokens @ embedding.T).log_softmax(-1)
    name = scores.gather(1, label_ids[batch.patch_label[shown]][:, None])
    place = scores.gather(1, quadrant_ids[batch.patch_quadrant[shown]][:, None])
    return -(name + place).mean() / 2


def answer_loss(
    model: LlavaForConditionalGeneration, projected: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers' words (and, lightly, of the </s> after them), and the per-kind hits.

    Args:
        model: Its decoder and output head are used.
        projected: Visual tokens, (B, N, D), as many as the batch's prefix has room for.
        batch: The questions.

    Returns:
        The loss, and (2, kinds): answers right in every word, and answers asked, per kind.
    """
    decoder = model.model.language_model
    words = decoder.embed_tokens(batch.input_ids)
    prefix = 1 + projected.shape[1]
    embeds = torch.cat([words[:, :1], projected, words[:, prefix:]], dim=1)
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask(),
        position_ids=batch.position_ids,
        use_cache=False,
        prefix=prefix,
    ).last_hidden_state
    scored = batch.target != IGNORE
    logits, target, kind = model.lm_head(hidden[scored]), batch.target[scored], batch.kind[scored]
    losses = F.cross_entropy(logits, target, reduction="none")
    is_answer = kind != IGNORE
    loss = losses[is_answer].mean() + 0.1 * losses[~is_answer].mean()
    # A question is the kind and the misses of its block: (B, blocks + 1), the prefix being block 0.
    row, block = (index[is_answer] for index in (scored.nonzero()[:, 0], batch.block[scored]))
    asked = batch.block.new_full((len(batch.block), int(batch.block.max()) + 1), IGNORE)
    asked[row, block] = kind[is_answer]
    missed = (logits.argmax(-1) != target)[is_answer].long()
    misses = torch.zeros_like(asked).index_put_((row, block), missed, accumulate=True)
    kinds = range(len(KINDS))
    per_kind = torch.tensor(
        [[((asked == k) & (misses == 0)).sum() for k in kinds], [(asked == k).sum() for k in kinds]]
    )
    return loss, per_kind

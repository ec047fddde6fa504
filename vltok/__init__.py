"""vltok compresses the visual tokens of vision-language models: one call puts a method on, one call takes it off.

    handle = vltok.apply(model, vltok.ToDRE(keep_ratio=0.1))
    ...
    handle.remove()

What it exports stands in `__init__.pyi` and is loaded when asked for: torch with the first name, transformers with the
model that you hand in.
"""

import lazy_loader

from vltok.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Models of Hugging Face transformers, with our expert MLP: importing this package makes it known to them.

    import lightning_swiftmoe.hf
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="swiftmoe")

Raises:
    ImportError: transformers is not installed, or too old to have an experts interface.
"""

from lightning_swiftmoe.hf.experts_interface import NAME, experts_forward, register
from lightning_swiftmoe.hf.saved_weights import meta_model

__all__ = ["NAME", "experts_forward", "meta_model", "register"]

register()

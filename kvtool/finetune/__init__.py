"""Fine-tuning a model to a cache format; the extra ``kvtool[finetune]``.

``training`` is the loop and its verdict; ``gradient`` attention with a straight-through sign; ``lora`` the adapter's
factors, through peft. Serving an adapter (``kvtool.adapter``) needs none of it.
"""

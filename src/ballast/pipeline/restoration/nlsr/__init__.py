"""Neuron-level safety realignment: the formulas in `algebra`, models in `realign`, a LoRA as the result in `lora`."""

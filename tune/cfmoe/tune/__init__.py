"""Fine-tuning for routing locality: losses, elastic LoRA, tasks, recipe and evaluation. Needs the `tune` extra."""

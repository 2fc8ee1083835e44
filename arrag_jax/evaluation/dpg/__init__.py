"""DPG-Bench: whether images show everything that dense prompts say, by questions to a VQA model (arXiv 2403.05135)."""

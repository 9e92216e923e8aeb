"""Files that training writes: resume checkpoints, and the folder model/ that the next stage loads."""

from llm.checkpoint.model_folder import load_model_folder, save_model_folder

__all__ = ["load_model_folder", "save_model_folder"]

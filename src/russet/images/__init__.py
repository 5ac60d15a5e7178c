"""Pictures: Pillow images and tensors, PNG files and their metadata, and CLIP's image processor."""

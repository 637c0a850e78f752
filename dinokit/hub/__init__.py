"""torch.hub entry points: released models with the API of DINO and DINOv2."""

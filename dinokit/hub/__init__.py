"""What torch.hub's door, hubconf.py, opens to: released models, by the names and the API of their users."""

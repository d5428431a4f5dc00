"""What the rest of davae builds on: files, processes, devices, pictures. Nothing here is about diffusion."""

"""What every part stands on: files, processes, devices, pictures. It knows no diffusion."""

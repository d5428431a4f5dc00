"""Reading, cropping and mirroring images, and the interface of all data sets."""

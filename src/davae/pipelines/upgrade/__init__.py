"""From a pipeline and a structured autoencoder to the pipeline that makes larger images."""

"""One image of a data set: how it is read, cut, mirrored, and what every data set of images offers."""

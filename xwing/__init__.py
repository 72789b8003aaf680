"""What goes beyond `xwing_utils`: meshes, alignment, tracking, footage, films, training."""

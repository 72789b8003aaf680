"""What goes beyond `xwing_utils`: the mesh, alignment, tracking, footage, films, evaluation and training."""

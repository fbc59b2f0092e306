"""Pages that show a run or its data: one self-contained HTML file each, which loads nothing."""

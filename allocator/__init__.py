"""Which byte range is whose: integers only, no torch, no files, no clock."""

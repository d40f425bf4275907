"""What the library does on one GPU, in parts that a later run continues: `make gpu`."""

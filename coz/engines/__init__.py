"""Where the stages of an evaluation run: in this process and its metric workers, or as Ray actors on any number of machines."""

"""`/dispatch` verbs, one a file; the file name is the verb and each module exposes `plugin`, a Command."""

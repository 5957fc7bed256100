"""Data sets, their transforms and the composition of batches.

A data set is an object with

- ``name`` and ``protocol`` (the name under which results.json reports its numbers),
- ``ids``: a name for each image, and ``labelled(task)``, those of the images scored for a task,
- ``skipped``: one line for each image that was left out for a fault,
- ``classes``: names of the classes of seg and parts, ``{"seg": ("background", ...), "parts": PART_NAMES}``,
- ``groups``: a tuple of integer arrays. Each lists the indices of the images that are labelled for the
  same tasks; together they are a partition of ``range(len(dataset))``,
- ``len(dataset)`` and ``dataset[index, epoch]``, which returns a dict of numpy arrays: ``"image"``, uint8
  (H, W, 3) RGB, and one entry per *labelled* task with the conventions of :mod:`train.tasks.names`. Augmentation
  is a function of (seed, epoch, index) and nothing else.
"""

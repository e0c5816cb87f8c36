"""Pictograms: the packaged drawings, their licences, and the tasks that are made of them."""

from __future__ import annotations

import zipfile

from skipkernels.app.data import TaskOptions, load_task, pictograms


def test_archive_has_a_drawing_of_each_name_by_each_designer():
    with zipfile.ZipFile(pictograms.ARCHIVE) as archive:
        files = set(archive.namelist())
        licences = archive.read("LICENSES").decode()
    names = pictograms.names_of(pictograms.TASKS)
    assert len(names) == len(set(names)) == 850 and {"red apple", "rocket", "elephant"} <= set(names)
    sets = (*pictograms.TRAIN, *pictograms.TEST)
    assert files == {f"{prefix}/{name}.png" for prefix in sets for name in names} | {"classes.csv", "LICENSES"}
    assert all(f"({prefix}), 850 icons" in licences for prefix in sets)
    assert [licences.count(name) for name in ("(Apache-2.0)", "(CC-BY-4.0)", "(MIT)")] == [1, 1, 1]


def test_base_to_new_tests_on_another_designer():
    task = load_task("pictograms:animals", TaskOptions(protocol="base-to-new", shots=2))
    base, new = task.tests
    assert len(base.classes) + len(new.classes) == 156 and not set(base.classes) & set(new.classes)
    assert len(task.train) == 2 * len(base.classes) and len(base.images) == len(base.classes)
    assert {name.split("/")[0] for name in task.train.names} == set(pictograms.TRAIN)
    assert {name.split("/")[0] for name in base.images.names} == set(pictograms.TEST)
    image, label = base.images[3]
    assert (
        image.size == (64, 64) and image.mode == "RGB" and base.images.names[3].endswith(f"/{base.classes[label]}.png")
    )

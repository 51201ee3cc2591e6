"""Whether a class is told from its siblings by one latent or only by several: M7 of ViSAEBench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from torch import Tensor

from sae_lightning.files import write_json
from sae_lightning.metrics import probes
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import Column, Options, Part, ScoredRun, register
from sae_lightning.metrics.probes import Matrix
from sae_lightning.metrics.protocols import RELEASED
from sae_lightning.metrics.sparse_probing import class_sums, f_statistics_of, ranked

Groups = Mapping[str, Sequence[str | int]]

ONE, FEW = 1, 4  # latents of the two probes


class Task(NamedTuple):
    """A class against its siblings: F1 on the held-out images of probes of the best latent and of the best four."""

    group: str
    name: str
    label: int
    f1_1: float
    f1_4: float
    converged: bool


class Absorption(NamedTuple):
    """``scores`` of an SAE and the ``tasks`` behind them."""

    scores: list[Score]
    tasks: list[Task]


def absorption(
    codes: Matrix, labels: np.ndarray | Tensor, groups: Groups, class_names: Sequence[str],
    split: probes.Split | None = None, alphas: Sequence[float] = (0.7, 0.8, 0.9),
    betas: Sequence[float] = (0.3, 0.5, 0.7), min_classes: int = 3, C: float = 1.0, max_iter: int = 500,
) -> Absorption:  # fmt: skip
    """M7: the share of class-versus-siblings tasks with F1(1) < α and F1(4) > β [ViSAEBench §4.4, App. N].

    ``codes`` [N, d_sae] max-pooled, ``labels`` [N] int64 index ``class_names``. ``groups`` maps a group's name to its
    classes, by name or by label; those without images in the split are ignored, and so are groups with fewer than
    ``min_classes`` left. ``split``, by default ``probes.split(labels)``, is that of all images, of which a task takes
    its group's.

    ``absorption`` has a score for each α and β, as ``alpha=0.8,beta=0.5`` (the paper's choice); ``absorption_f1`` is
    the mean F1 of ``k=1`` and of ``k=4`` latents, ``absorption_tasks`` the number of tasks, ``absorption_converged``
    the share of them whose solvers did. All but the number are NaN without a task. ValueError for a class that a group
    names but ``class_names`` holds twice, and as in ``probes.split``.
    """
    codes, labels = probes.as_codes(codes), probes.as_labels(labels)
    probes.check_rows(labels, codes=codes)
    train, test = probes.split(labels) if split is None else split
    tasks = []
    for group, members in members_of(groups, class_names, labels[np.concatenate([train, test])], min_classes).items():
        rows = (part[np.isin(labels[part], members)] for part in (train, test))
        fit_on, held = ((codes[part], labels[part]) for part in rows)
        for label, f1_1, f1_4, converged in _group_tasks(*fit_on, *held, members, C, max_iter):
            tasks.append(Task(group, class_names[label], label, f1_1, f1_4, converged))
    return Absorption(summary(tasks, alphas, betas), tasks)


def summary(tasks: Sequence[Task], alphas: Sequence[float], betas: Sequence[float]) -> list[Score]:
    """The scores that follow from the ``tasks``."""
    one, few = np.array([task.f1_1 for task in tasks]), np.array([task.f1_4 for task in tasks])
    return [
        *(
            averaged("absorption", (one < alpha) & (few > beta), f"alpha={alpha:g},beta={beta:g}", unit="tasks")
            for alpha in alphas
            for beta in betas
        ),
        averaged("absorption_f1", one, f"k={ONE}", unit="tasks"),
        averaged("absorption_f1", few, f"k={FEW}", unit="tasks"),
        Score("absorption_tasks", float(len(tasks))),
        averaged("absorption_converged", [task.converged for task in tasks], unit="tasks"),
    ]


def members_of(
    groups: Groups, class_names: Sequence[str], labels: np.ndarray, min_classes: int = 3
) -> dict[str, list[int]]:
    """Labels of the classes of each group that have images, for groups with ``min_classes`` of them or more."""
    places: dict[str | int, list[int]] = {label: [label] for label in range(len(class_names))}
    for label, each in enumerate(class_names):
        places.setdefault(each, []).append(label)
    present = set(np.unique(labels).tolist())
    found = {}
    for group, names in groups.items():
        members: list[int] = []
        for name in dict.fromkeys(names):
            at = places.get(name, [])
            if len(at) > 1:
                raise ValueError(
                    f"Sibling group '{group}' names '{name}', which is the name of classes {at}; give their labels "
                    "instead of the name."
                )
            members += [label for label in at if label in present and label not in members]
        if len(members) >= min_classes:
            found[group] = members
    return found


def _group_tasks(
    train: sparse.csr_array, train_labels: np.ndarray, test: sparse.csr_array, test_labels: np.ndarray,
    members: Sequence[int], C: float, max_iter: int,
) -> list[tuple[int, float, float, bool]]:  # fmt: skip
    """(label, F1(1), F1(4), whether both probes converged) of every member with images of both kinds in both parts."""
    sums, columns, held = class_sums(train, train_labels), train.tocsc(), test.tocsc()
    found = []
    for label in members:
        actual = test_labels == label
        at = np.flatnonzero(sums.classes == label)
        if not len(at) or len(sums.classes) < 2 or not actual.any() or actual.all():
            continue
        best = ranked(f_statistics_of(sums, int(at[0])))[:FEW]
        x, y, z = columns[:, best].toarray(), train_labels == label, held[:, best].toarray()
        one, few = (probes.fit(x[:, :k], y, C, max_iter) for k in (ONE, FEW))
        f1_1, f1_4 = (f1(probes.predict(m, z[:, :k]) == 1, actual) for m, k in ((one, ONE), (few, FEW)))
        found.append((label, f1_1, f1_4, one.converged_ and few.converged_))
    return found


def released(run: ScoredRun, options: Options) -> list[Score]:
    """M7 as the released package has it, with its groups where the classes are ImageNet's.

    Probes are scored where they were fitted, on all images of a group. A class is absorbed where F1(4) − F1(1) is above
    ``gap``, or the Jaccard index of its ``top`` latents by mean activation and its group's is above ``overlap``.
    """
    images, fit = run.images(), probes.solver(options)
    codes, labels, classes = probes.as_codes(images.codes), images.labels, np.arange(len(images.class_names))
    listed = {name: of for name, of in run.sibling_groups(released=True).items() if len(of) >= options["min_group"]}
    f1s, overlaps = [], []
    for members in members_of(listed, images.class_names, classes, 1).values():
        rows = np.isin(labels, members)
        group, own = codes[rows], labels[rows]
        counts = {label: int((own == label).sum()) for label in members}
        few = options["min_class"]
        tested = [label for label, n in counts.items() if few <= n <= len(own) - few]
        if len(own) < options["min_images"] or not tested:
            continue
        shared = strongest(group, options["top"])
        for label, *both, _ in _group_tasks(group, own, group, own, tested, **fit):
            mine = strongest(group[own == label], options["top"])
            f1s.append(both)
            overlaps.append(len(mine & shared) / len(mine | shared))
    (one, four), overlap = np.array(f1s).reshape(-1, 2).T, np.array(overlaps)
    absorbed = (four - one > options["gap"]) | (overlap > options["overlap"])
    figures = (("absorption", absorbed, ""), ("absorption_overlap", overlap, ""), ("absorption_f1", one, f"k={ONE}"),
               ("absorption_f1", four, f"k={FEW}"))  # fmt: skip
    found = [averaged(metric, values, setting, unit="tasks") for metric, values, setting in figures]
    return [*found, Score("absorption_tasks", float(len(overlap)))]


def strongest(codes: sparse.csr_array, top: int) -> set[int]:
    """The ``top`` latents of the largest mean of ``codes`` [n, d_sae]; of equal ones the higher."""
    return set(np.argsort(codes.sum(0, dtype=np.float64), kind="stable")[-top:].tolist())


def f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of boolean arrays; 0 when nothing is predicted nor actual."""
    both = int(predicted.sum() + actual.sum())
    return 2 * int((predicted & actual).sum()) / both if both else 0.0


ABSORPTION = "absorption.json"


def scores(run: ScoredRun, options: Options) -> list[Score]:
    """M7 at every pair of thresholds; its tasks are kept as json."""
    images, split = run.images(), probes.split_of(run, options)
    found = absorption(
        images.codes, images.labels, run.sibling_groups(), images.class_names, split, options["alphas"],
        options["betas"], options["min_group"], **probes.solver(options),
    )  # fmt: skip
    write_json(run.folder / ABSORPTION, [task._asdict() for task in found.tasks])
    return [*found.scores, *probes.classes_left_out(run, options, "absorption")]


PART = register(Part(
    "absorption", scores, needs=("images", "labels"), title="M7: absorption",
    about="Share of the tasks with F1(k = 1) < α and F1(k = 4) > β.",
    undefined="no group of sibling classes has {min_group} of them among the images that probes see",
    otherwise={"compute": released},
    columns=(
        Column("M7 absorption", "absorption", better=False, headline="M7", protocol=RELEASED, about="share of classes "
               "that four latents tell better than one, or that share their strongest latents with their siblings"),
        Column("M7 absorption", "absorption", "alpha=0.8,beta=0.5", better=False, headline="M7", about="share of "
               "tasks, a class against its siblings, that one latent does not solve and four do"),
        Column("β = {beta}", "absorption", "alpha={alpha},beta={beta}", better=False, over="α = {alpha}"),
        Column("k = {k}", "absorption_f1", "k={k}", over="mean F1"), Column("tasks", "absorption_tasks", form=",.0f"),
    ),
))  # fmt: skip

"""The table knows every setting of ``conf/``, and says in a sentence what cannot be."""

import inspect
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf

from sae_lightning import saes
from sae_lightning.data import data_source
from sae_lightning.metrics.part import PARTS, all_parts
from sae_lightning.saes import VARIANTS
from sae_lightning.saes.losses import TERMS
from sae_lightning.settings import SettingsError, check_settings, mistakes
from sae_lightning.settings import table as known
from sae_lightning.training.monoloss import MonoLoss
from tests.settings.typed import CONF, composed, typed

GIVEN_BY_US = {"self", "logger", "callbacks", "plugins", "default_root_dir", "use_distributed_sampler"}
EXPERIMENTS = sorted(str(p.relative_to(CONF / "experiment").with_suffix("")) for p in CONF.glob("experiment/**/*.yaml"))
OWN_DATA = {"cifar10": ["data.path=x"], "imagenet": ["data.path=x"]}


def found(command: str, *words: str) -> str:
    return "\n".join(mistakes(command, *typed(command, *words)))


# --- what there is ------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", known.COMMANDS)
def test_the_defaults_of_every_command_are_settings_that_can_be(command):
    assert found(command) == ""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_one_that_can_be(name):
    command = "finetune" if name.startswith("finetune/") else "train"
    data = (
        ["data=imagenet"]
        if name.startswith("monoloss/") and name.split("/")[1] in known.VARIANTS | {"vanilla": 0, "paper": 0}
        else []
    )
    needs = ["data.path=x"] if data or name.split("/")[-1] in OWN_DATA else []
    allowed = "paper_weights" if name == "monoloss/paper" else ""  # which the files beside it bring
    said = found(command, f"experiment={name}", *data, *needs)
    assert allowed in said if allowed else said == ""


def test_the_trainer_takes_what_lightnings_takes():
    takes = set(inspect.signature(L.Trainer.__init__).parameters) - GIVEN_BY_US
    assert set(known.TRAINER) == takes
    assert set(composed("train").trainer) == takes, "conf/trainer/default.yaml lists all, so that none needs a plus"
    strategies = [s for s in StrategyRegistry.available_strategies() if "single" not in s]
    assert all(known.TRAINER["strategy"].fits(name) for name in strategies)


def test_the_table_names_what_the_package_has():
    assert set(known.VARIANTS) <= set(VARIANTS)  # a variant that the table does not know checks its settings itself
    for name, cls in ((name, VARIANTS[name]) for name in known.VARIANTS):
        settings = {
            key for parent in cls.__mro__ if issubclass(parent, saes.SAE) and "__init__" in vars(parent)
            for key in inspect.signature(parent.__init__).parameters
        }  # fmt: skip
        assert set(known.VARIANTS[name]) == settings - {"self", "d_in", "d_sae", "normalizer", "seed", "options"}
    assert set(known.LOSSES) == set(TERMS)
    assert set(known.SOURCES) == {*data_source, "store"}
    assert set(known.METRICS.rules) == {"protocol", *(part.name for part in all_parts())}
    assert set(known.MONOLOSS) - {"_target_"} == set(inspect.signature(MonoLoss).parameters)


# --- what cannot be -----------------------------------------------------------------------------------
WRONG = [  # command, what is typed, what is said
    ("train", "experiment=monoloss/topk data=imagenet data.path=x expansion=4", r"no effect beside d_sae=8192"),
    ("train", "k=foo", r"k=foo must be a number above 0"),
    ("train", "k=null", r"k=null must be a number above 0"),
    ("train", "k=0", r"k=0 must be a number above 0"),
    ("train", "k=99999", r"k=99999 must not be above .* 1024 \(of 128 dimensions\); lower k or raise expansion"),
    ("train", "sae=topk k=2.5", r"k=2\.5 must be a whole number of at least 1; sae=batchtopk takes fractions"),
    ("train", "sae=relu k=5000", r"k=5000 must not be above"),
    ("train", "expansion=null", r"expansion=null must be a whole number"),
    ("train", "expansion=foo", r"expansion=foo must be a whole number"),
    ("train", "expansion=[8,16]", r"expansion=\[8, 16\] must be a whole number"),
    ("train", "expansion=0", r"expansion=0 must be"),
    ("train", "expansion=1.5", r"expansion=1\.5 must be a whole number"),
    ("train", "expansion=10000000", r"expansion=10000000 must be a whole number from 1 to 65536"),
    ("train", "d_sae=2000000000", r"d_sae=2000000000 makes weights of [\d,]+ GiB, and this machine has"),
    ("train", "seed=-1", r"seed=-1 must be a whole number from 0"),
    ("train", "seed=true", r"seed=true must be a whole number"),
    ("train", "batch_size=100", r"batch_size=100 must be a multiple of the 8 lanes"),
    ("train", "optimizer.lr=foo", r"optimizer\.lr=foo must be a number above 0"),
    ("train", "optimizer.lr=-1", r"optimizer\.lr=-1 must be"),
    ("train", "optimizer.lr=.nan", r"optimizer\.lr=nan must be"),
    ("train", "optimizer.name=foo", r"Unknown optimizer\.name=foo; choose one of adam, adamw"),
    ("train", "optimizer.name=adm", r"did you mean adam\?"),
    ("train", "+optimizer.momentum=1", r"There is no setting optimizer\.momentum"),
    ("train", "+optimizer.betas=[0.9]", r"optimizer\.betas=\[0\.9\] must be a list of at least 2"),
    ("train", "+sae.settings.foo=1", r"There is no setting sae\.settings\.foo.* takes .*k_per"),
    ("train", "+sae.settings.tied=maybe", r"sae\.settings\.tied=maybe must be true or false"),
    ("train", "sae.name=topkk", r"Unknown sae\.name=topkk; .*did you mean topk\?"),
    ("train", "sae.threshold=guessed", r"choose one of calibrated, running_minimum, running_average"),
    ("train", "+sae.settings.k_per=batch", r"set sae\.threshold=running_average"),
    ("train", "sae=matryoshka sae.settings.fractions=[0.5,0.25,1]", r"must ascend to 1"),
    ("train", "sae=msae sae.settings.ks=[8,4]", r"ks=\[8, 4\] must ascend"),
    ("train", "extract.batch_size=0", r"extract\.batch_size=0 must be a whole number of at least 1"),
    ("train", "extract.device=foo", r"Unknown extract\.device=foo|extract\.device=foo must be"),
    ("train", "extract.part=4/4", r"extract\.part=4/4 must look like 0/4"),
    ("train", "extract.precision=8", r"Unknown extract\.precision=8; choose one of 32, bf16, 16"),
    ("train", "+expnasion=8", r"There is no setting expnasion; did you mean expansion\?"),
    ("train", "+lr=0.1", r"There is no setting lr; did you mean optimizer\.lr\?"),
    ("train", "+mine=1", r"There is no setting mine"),
    ("train", "+loss.cosin=0.1", r"There is no setting loss\.cosin; did you mean loss\.cosine\?"),
    ("train", "+los.cosine=0.1", r"did you mean loss\?"),
    ("train", "loss.aux=-1", r"loss\.aux=-1 must be a number of at least 0"),
    ("train", "sae=topk +loss.nested=1", r"sae\.name=topk has no loss term nested; set loss\.nested=0, or choose"),
    ("train", "loss.reconstruction=0", r"No term of the loss asks for a reconstruction"),
    ("train", "sae=relu loss.sparsity=0", r"set loss\.sparsity above 0"),
    ("train", "dead_after=-1", r"dead_after=-1 must be a whole number of at least 1"),
    ("train", "normalize=whiten", r"Unknown normalize=whiten; choose one of standard, none"),
    ("train", "init.b_pre=median", r"choose one of mean, geometric_median, zero"),
    ("train", "features=patchs", r"Unknown features=patchs; .*did you mean patch\?"),
    ("train", "resample.every=-1", r"resample\.every=-1"),
    ("train", "schedule.warmup=2", r"schedule\.warmup=2 must be a number from 0 to 1"),
    ("train", "schedule.shape=square", r"Unknown schedule\.shape=square"),
    ("train", "schedule.k_share=0.5", r"k_share needs schedule\.k_from"),
    ("train", "stream.unit=rows", r"Unknown stream\.unit=rows; choose one of tokens, images"),
    ("train", "stream=null", r"stream=null must be a section of unit, "),
    ("train", "stream.damaged=maybe", r"choose one of refuse, skip"),
    ("train", "pack.members=0", r"pack\.members=0 must be a whole number of at least 1"),
    ("train", "pack.when=sometimes", r"Unknown pack\.when=sometimes; choose one of auto, always, never"),
    ("train", "paths.runs=[a]", r"paths\.runs=\[a\] must be a path"),
    ("train", "trainer.max_epochs=0", r"trainer\.max_epochs=0 must be a whole number of at least 1"),
    ("train", "trainer.max_epochs=-1", r"trainer\.max_epochs=-1 has no end"),
    ("train", "trainer.limit_train_batches=-2", r"trainer\.limit_train_batches=-2 must be a number of batches"),
    ("train", "trainer.limit_train_batches=1.5", r"must be a number of batches"),
    ("train", "+trainer.limit_trian_batches=2", r"did you mean trainer\.limit_train_batches\?"),
    ("train", "+trainer.logger=false", r"There is no setting trainer\.logger"),
    ("train", "trainer.max_time=soon", r"trainer\.max_time=soon must be a time such as"),
    ("train", "trainer.precision=bf16-true", r"trainer\.precision=bf16-mixed is as fast"),
    ("train", "trainer.precision=17", r"Unknown trainer\.precision=17"),
    ("train", "trainer.devices=3", r"trainer\.devices=3 makes 3 processes, which cannot share the 8 lanes"),
    ("train", "trainer.devices=[0,1,2]", r"makes 3 processes"),
    ("train", "trainer.devices=0", r"trainer\.devices=0 must be"),
    ("train", "trainer.accelerator=gpuu", r"Unknown trainer\.accelerator=gpuu; .*did you mean gpu\?"),
    ("train", "trainer.barebones=true", r"trainer\.barebones=true must be false"),
    ("train", "trainer.profiler=foo", r"Unknown trainer\.profiler=foo"),
    ("train", "+logger.paper={}", r"There is no setting logger\.paper"),
    ("train", "+callbacks.mine.weight=1", r"callbacks\.mine has no _target_"),
    ("train", "callbacks=monoloss callbacks.monoloss.weight=-1", r"callbacks\.monoloss\.weight=-1 must be"),
    ("train", "callbacks=monoloss +callbacks.monoloss.wieght=1", r"did you mean callbacks\.monoloss\.weight\?"),
    ("train", "data=folder", r"data\.path has to be set; give data\.path=…"),
    ("train", "data=folder data.path=x data.shares=train:0.9", r"train:0\.9 must be a section of train, .*quotes"),
    ("train", "data=folder data.path=x data.shares.train=0.9", r"data\.shares=.* must give .* that add up to 1"),
    ("train", "data=folder data.path=x data.limit=0", r"data\.limit=0 must be"),
    ("train", "data.source=foldr", r"Unknown data\.source=foldr; .*did you mean folder\?"),
    ("train", "+data.pth=x", r"There is no setting data\.pth; did you mean data\.path\?"),
    ("train", "backbone.size=huge", r"Unknown backbone\.size=huge; choose one of tiny, published"),
    ("train", "backbone.layer=last", r"backbone\.layer=last must be a whole number"),
    ("train", "checkpoint.every_minutes=0", r"checkpoint\.every_minutes=0 must be"),
    ("train", "subset.images=${nothing}", r"subset\.images=\$\{nothing\} leads nowhere"),
    ("extract", "splits=[train,tset]", r"splits=\[train, tset\] must be a list, each one of train, val, test"),
    ("extract", "features=[patch,foo]", r"features=\[patch, foo\] must be"),
    ("extract", "layers=foo", r"layers=foo must be"),
    ("extract", "extract.num_workers=-1", r"extract\.num_workers=-1"),
    ("extract", "data=folder data.path=x data.shares={train: 0.5, val: 0.1, test: 0.1}", r"add up to 1"),
    ("evaluate", "batch_tokens=0", r"batch_tokens=0 must be a whole number of at least 1"),
    ("evaluate", "latents_shown=-1", r"latents_shown=-1 must be a whole number of at least 1"),
    ("evaluate", "split=tset", r"Unknown split=tset; .*did you mean test\?"),
    ("evaluate", "device=foo", r"device=foo"),
    ("evaluate", "devices=0", r"devices=0"),
    ("evaluate", "memory_gb=-1", r"memory_gb=-1"),
    ("evaluate", "again=maybe", r"again=maybe must be true or false"),
    ("evaluate", "similarity_features=patchs", r"Unknown similarity_features=patchs"),
    ("evaluate", "+metrics.mran={}", r"There is no setting metrics\.mran; did you mean metrics\.moran\?"),
    ("evaluate", "metrics=visaebench metrics.moran.contiguity=king", r"choose one of queen, rook"),
    ("evaluate", "metrics=visaebench metrics.sparse_probing.budgets=[0,1]", r"budgets=\[0, 1\] must be a list"),
    ("evaluate", "metrics=visaebench metrics.absorption.seed=x", r"metrics\.absorption\.seed=x"),
    ("evaluate", "+rnus=x", r"did you mean runs\?"),
    ("report", "detailed=-1", r"detailed=-1 must be a whole number of at least 0"),
    ("report", "grids=many", r"grids=many"),
    ("report", "+outt=x", r"did you mean out\?"),
    ("explore", "app.name=namin", r"Unknown app\.name=namin; .*did you mean naming\?"),
    ("explore", "app.top=0", r"app\.top=0 must be"),
    ("explore", "app.thresholds.cosine=high", r"app\.thresholds\.cosine=high must be a number"),
    ("explore", "app.named=abov", r"did you mean above\?"),
    ("explore", "app=bias split=train", r"set split=test"),
    ("explore", "app=stability split=train", r"measured on other images"),
    ("explore", "app=search app.turn.unit=feet", r"choose one of spread, code"),
    ("explore", "app=explorer app.port=99999", r"app\.port=99999 must be a whole number from 0 to 65535"),
    ("explore", "app=agreement app.simulated=5 app.judgements=x.csv", r"people and made-up judges are not mixed"),
    ("finetune", "mono_weight=foo", r"mono_weight=foo must be a number of at least 0"),
    ("finetune", "augment=blur", r"Unknown augment=blur"),
    ("finetune", "epochs=0", r"epochs=0 must be"),
    ("finetune", "optimizer.momentum=1", r"optimizer\.momentum=1 must be"),
    ("finetune", "trainer.num_nodes=2", r"Fine-tuning works on one node"),
    ("finetune", "batch_size=7 trainer.devices=2", r"multiple of the 2 devices"),
    ("finetune", "recipe=foo", r"Unknown recipe=foo; choose one of cifar, imagenet"),
    ("finetune", "trainer.precision=bf16-true", r"bf16-mixed"),
    ("finetune", "held_out=none", r"Unknown held_out=none"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "sentence"), WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_said_in_a_sentence(command, words, sentence):
    said = mistakes(command, *typed(command, *re.split(r" (?=[+\w.]+=)", words)))
    assert len(said) == 1, said
    assert re.search(sentence, said[0]), said
    assert "\n" not in said[0]
    assert said[0].endswith((".", "?", "…"))


def test_several_mistakes_are_counted_and_listed():
    with pytest.raises(SettingsError) as caught:
        check_settings("train", *typed("train", "k=foo", "optimizer.lr=-1", "+expnasion=8"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 settings cannot be:"
    assert [line.split("=")[0] for line in lines[1:3]] == ["- k", "- optimizer.lr"]
    assert lines[3] == "- There is no setting expnasion; did you mean expansion?"


# --- what can be ----------------------------------------------------------------------------------------
RIGHT = [
    ("train", "trainer.limit_train_batches=5"),
    ("train", "trainer.limit_train_batches=0.25 trainer.accumulate_grad_batches=2 trainer.precision=bf16-mixed"),
    ("train", "trainer.max_time=00:00:10:00 trainer.max_epochs=-1"),
    ("train", "trainer.max_time={hours: 2} trainer.devices=[0,1] trainer.fast_dev_run=2"),
    ("train", "trainer.devices=-1 trainer.strategy=ddp_find_unused_parameters_true trainer.gradient_clip_val=null"),
    ("train", "k=2.5 expansion=8.0 d_sae=512"),
    ("train", "+loss.cosine=0.1 +sae.settings.tied=true +optimizer.betas=[0.9,0.95]"),
    ("train", "sae=msae sae.settings.ks=[4,8] sae.settings.soft_cap=2"),
    ("train", "data.siblings=x.json"),
    ("train", "subset.classes=[cat,dog] checkpoint.every_steps=5"),
    # the user's own
    ("train", "+callbacks.mine={_target_: package.Mine, anything: [1, 2]} +callbacks.off=null"),
    ("train", "+width=8 expansion=${width}"),
    ("train", "sae.name=theirs +sae.settings.theirs=1"),
    ("train", "data.source=theirs +data.theirs=1"),
    ("train", "+loss.theirs=1"),
    ("evaluate", "metrics=visaebench metrics.segmentation=null metrics.stability=false metrics.retrieval=true"),
    ("evaluate", "runs=[a,b] device=cuda:1 +metrics.theirs={}"),
    ("explore", "app=naming app.vocabulary=[classes,mine.txt]"),
    ("explore", "app=search app.turn.latents=[3,cat] app.queries=[1,x.png]"),
    ("finetune", "layer=encoder.blocks.3 validate=null +optimizer.nesterov=true"),
]


@pytest.mark.parametrize(("command", "words"), RIGHT)
def test_what_can_be_is_taken(command, words, monkeypatch):
    for mapping in (VARIANTS, data_source, TERMS, PARTS):
        monkeypatch.setitem(mapping, "theirs", saes.SAE)
    assert found(command, *re.split(r" (?=[+\w.]+=)", words)) == ""


def test_whole_floats_are_taken_as_numbers():
    cfg, hydra = typed("train", "expansion=8.0", "seed=3.0")
    check_settings("train", cfg, hydra)
    assert (type(cfg.expansion), cfg.expansion, cfg.seed) == (int, 8, 3)


def test_a_key_of_a_file_may_be_the_users_own_but_not_a_misspelt_one():
    cfg = OmegaConf.merge(OmegaConf.create({}), composed("train"))
    OmegaConf.set_struct(cfg, False)
    cfg.notes = {"author": "me"}
    assert mistakes("train", cfg) == []
    cfg.expnasion = 8
    assert mistakes("train", cfg) == ["There is no setting expnasion; did you mean expansion?"]


def test_checking_imports_nothing_heavy():
    heavy = {"torch", "lightning", "numpy", "transformers", "sae_lightning.saes"}
    folder = Path(check_settings.__code__.co_filename).parent
    for file in [
        *folder.glob("*.py"),
        folder.parent / "commands" / "entry.py",
        folder.parent / "commands" / "sentences.py",
    ]:
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if line[:1] != " " and words[:1] in (["import"], ["from"]):
                assert not any(words[1] == name or words[1].startswith(f"{name}.") for name in heavy), (file, line)

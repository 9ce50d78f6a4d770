"""The commands of the command line: what each is for, what its settings are, which code runs it.

Only names: nothing is imported until a command runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Target:
    """Code behind a command: `run(config)` in `module`, where `config` is an instance of its class
    `settings`.
    """

    module: str
    settings: str
    run: str = "run"
    settings_module: str = ""  # "" = `module`
    reports_progress: bool = True  # takes on_progress=; the training stages draw their own bar
    handed_down: str = ""  # a module whose terms() the run gets as terms=: rewards of the tasks
    in_every_process: bool = False  # that torchrun started: they join, all run it, and the first one speaks
    explained_by_module: bool = False  # help quotes the module's docstring, else that of the settings
    about: str = ""  # what help says instead

    @property
    def schema_module(self) -> str:
        return self.settings_module or self.module


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command as help teaches it; with `choice` it has several targets, picked by `choice=NAME`."""

    summary: str
    targets: Mapping[str, Target]
    choice: str = ""
    examples: Sequence[str] = field(default_factory=tuple)


# One loop, other settings.
PAPER_STAGES = {
    "pretrain1": "The paper's pretraining, first stage, for the small model: packed rows.",
    "pretrain2": "Its second stage: longer rows, from pretrain1's result.",
    "sft1": "Supervised fine-tuning, stage A: only answers are learnt, from pretrain2's result.",
    "sft2": "Stage B: longer rows, less weight on pictures, from sft1's result.",
}


def _stage(module: str, settings: str, *, handed_down: str = "", about: str = "") -> Target:
    """A training stage: `train(config)`, which draws its own progress."""
    return Target(
        module=module,
        settings=settings,
        run="train",
        handed_down=handed_down,
        reports_progress=False,
        explained_by_module=True,
        about=about,
    )


_GRPO = _stage("emuworld.training.grpo", "GrpoTraining", handed_down="emuworld.tasks.rewards")
COMMANDS: dict[str, Command] = {
    "demo": Command(
        summary="Make a page: pictures from words, a walk beside MuJoCo's, branches, a robot at work, films.",
        targets={"": Target(module="emuworld.tasks.demo", settings="Demo")},
        examples=(
            "emuworld demo",
            "emuworld demo seed=7 prompt='a room with a green box and a yellow cone'",
        ),
    ),
    "generate": Command(
        summary="Answer prompts in any mode: pictures, edits, stories, guides, walks, robot plans.",
        targets={"": Target(module="emuworld.tasks.generate", settings="Generate")},
        examples=(
            "emuworld generate mode=t2i prompt='a room with a red ball and a blue box' n=4",
            "emuworld generate mode=explore prompt='a room with a sofa' commands='[turn left, move forward]'",
            "emuworld generate mode=x2i prompt='make the red ball green' images='[room.png]'",
            "emuworld generate mode=story prompts=stories.jsonl out=outputs/stories shard=0/2",
        ),
    ),
    "export": Command(
        summary="Write the pictures, texts and a film of answers (.pb), published ones or our own.",
        targets={"": Target(module="emuworld.tasks.export", settings="Export")},
        examples=(
            "emuworld export input=outputs/generate/proto",
            "emuworld export input=000.pb out=looked-at video=false",
            "emuworld export input=answers font=NotoSansCJK-Regular.ttc shard=0/4",
        ),
    ),
    "play": Command(
        summary="Walk through a room with keys or typed commands, and switch between dream and simulator.",
        targets={"": Target(module="emuworld.tasks.play", settings="Play")},
        examples=(
            "emuworld play",
            "emuworld play source=sim seed=3",
            "printf 'turn left\\nmove forward\\n:twin\\n' | emuworld play",
        ),
    ),
    "train": Command(
        summary="Train one stage on CPU or GPUs; a killed run resumes with the same command.",
        choice="stage",
        targets={
            "text": _stage("emuworld.training.text", "TextTraining"),
            "tokenizer": _stage("emuworld.training.tokenizer", "TokenizerTraining"),
            "pretrain": _stage("emuworld.training.supervised", "PretrainTraining"),
            "tune": _stage("emuworld.training.tune", "Tuning"),
            "dida": _stage("emuworld.training.distil", "DidaTraining"),
            "grpo": _GRPO,
            **{
                stage: _stage("emuworld.training.supervised", "PretrainTraining", about=about)
                for stage, about in PAPER_STAGES.items()
            },
            **{
                f"emu3_5/{stage}": _stage(
                    "emuworld.training.supervised",
                    "PretrainTraining",
                    about=f"Stage {stage} with the paper's settings: configs/train/emu3_5/{stage}.yaml.",
                )
                for stage in PAPER_STAGES
            },
            "emu3_5/grpo": replace(
                _GRPO, about="Stage grpo with the paper's settings: configs/train/emu3_5/grpo.yaml."
            ),
            "detector": Target(
                module="emuworld.tasks.detector_training",
                settings="DetectorStage",
                run="train",
                explained_by_module=True,
            ),
        },
        examples=(
            "emuworld data build out=outputs/data/train",
            "emuworld train stage=tokenizer shards=outputs/data/train",
            "emuworld train stage=detector device=cuda",
            "emuworld train stage=tune data=my-pictures out=outputs/mine",
        ),
    ),
    "eval": Command(
        summary="Measure a model against the simulator: figures with 95 % intervals as JSON and as a page.",
        choice="suite",
        targets={
            "explore-twin": Target(
                module="emuworld.tasks.evaluate",
                settings="ExploreTwin",
                settings_module="emuworld.tasks.suites",
            ),
            "t2i": Target(
                module="emuworld.tasks.evaluate",
                settings="TextToImage",
                settings_module="emuworld.tasks.suites",
            ),
            "x2i": Target(
                module="emuworld.tasks.evaluate",
                settings="EditPictures",
                settings_module="emuworld.tasks.suites",
            ),
            "story": Target(
                module="emuworld.tasks.evaluate",
                settings="TellTales",
                settings_module="emuworld.tasks.suites",
            ),
            "robot-331": Target(
                module="emuworld.tasks.evaluate",
                settings="RobotSuite",
                settings_module="emuworld.tasks.suites",
            ),
        },
        examples=(
            "emuworld eval suite=explore-twin",
            "emuworld eval suite=explore-twin num_starts=20 num_walks=2 num_turns=2",
            "emuworld eval suite=t2i device=cuda",
            "emuworld eval suite=x2i num_edits=40",
            "emuworld eval suite=story num_tales=12 split=validation",
            "emuworld eval suite=explore-twin score_only=true",
            "emuworld eval suite=robot-331 agent=oracle",
            "emuworld eval suite=robot-331 against=outputs/eval/robot-331/scripted",
        ),
    ),
    "compare": Command(
        summary="Did training make it better? Runs of eval before and after, case by case, on one page.",
        targets={
            "": Target(module="emuworld.tasks.compare", settings="Compare", reports_progress=False),
        },
        examples=(
            "emuworld compare before=outputs/grpo-small/before after=outputs/grpo-small/after",
            "emuworld compare before=before/t2i after=after/t2i log=outputs/train/grpo/grpo.log.jsonl",
        ),
    ),
    "plan": Command(
        summary="Plan a robot's task in the dream, carry it out in physics, write plan, film and verdict.",
        targets={"": Target(module="emuworld.tasks.robot.plan", settings="MakePlan")},
        examples=(
            "emuworld plan instruction='put the red cube on the blue plate'",
            "emuworld plan agent=oracle seed=3 out=outputs/oracle",
            "emuworld plan run=outputs/plan use=text out=outputs/words-alone",
        ),
    ),
    "convert": Command(
        summary="Write a checkpoint again: in the release's layout, for transformers and vLLM, or in 8 bits.",
        targets={"": Target(module="emuworld.tasks.convert", settings="Convert")},
        examples=(
            "emuworld convert model=/models/Emu3.5 out=/models/Emu3.5-qwen3",
            "emuworld convert model=outputs/tuned text=/models/text to=published out=/models/tuned",
            "emuworld convert model=outputs/small/pretrain to=int8 out=outputs/small/int8",
        ),
    ),
    "data": Command(
        summary="Render training stories from the simulated worlds into shards.",
        choice="action",
        targets={
            "build": Target(
                module="emuworld.envs.shards",
                settings="ShardsConfig",
            ),
            "prompts": Target(
                module="emuworld.tasks.reward_prompts", settings="RewardPrompts", explained_by_module=True
            ),
        },
        examples=(
            "emuworld data build out=outputs/data/train",
            "emuworld data build out=outputs/data/all num_edits=8 num_tales=1 num_tasks=2 num_tables=2",
        ),
    ),
    "bench": Command(
        summary="Measure speed, memory, rounding, and how well keyframes are read; figures as JSON.",
        choice="what",
        targets={
            "published-34b": Target(
                module="emuworld.tasks.scale",
                settings="PublishedSpeed",
                settings_module="emuworld.tasks.published_rig",
            ),
            "keyframes": Target(module="emuworld.tasks.robot.keyframe_bench", settings="KeyframeBench"),
            "small-cpu": Target(module="emuworld.tasks.speed.small", settings="SmallSpeed"),
            "many-worlds": Target(module="emuworld.tasks.speed.worlds", settings="ManyWorldsSpeed"),
            "drafting": Target(module="emuworld.tasks.speed.drafting", settings="DraftingSpeed"),
            "drafting-34b": Target(
                module="emuworld.tasks.speed.published", settings="DraftingStepSpeed", run="run_drafting"
            ),
            "fp8": Target(module="emuworld.tasks.speed.published", settings="Fp8Speed", run="run_fp8"),
            "fp8-accuracy": Target(module="emuworld.tasks.speed.accuracy", settings="Fp8Accuracy"),
            "batch-34b": Target(
                module="emuworld.tasks.speed.published", settings="BatchSpeed", run="run_batch"
            ),
            "all-34b": Target(module="emuworld.tasks.speed.everything", settings="EverythingSpeed"),
            "parallel-34b": Target(
                module="emuworld.tasks.speed.split",
                settings="SplitSpeed",
                reports_progress=False,
                in_every_process=True,
            ),
        },
        examples=(
            "emuworld bench what=published-34b device=cuda",
            "emuworld bench what=drafting num_worlds=2",
            "emuworld bench what=all-34b device=cuda budget_s=240",
            "emuworld bench what=keyframes vias=[simulator,small]",
            "torchrun --nproc-per-node 2 -m emuworld.cli bench what=parallel-34b device=cuda",
            "emuworld bench what=published-34b device=cpu size=tiny vision=tiny pictures=[8] story_side=8",
        ),
    ),
}

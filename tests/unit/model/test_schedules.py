"""Finished programs are read from the files that libtpu writes, and told apart where operations have one name."""

import os
from pathlib import Path

import pytest

from model.cost import Schedule
from scripts.planning.schedules import Schedules, finished_programs

HEAD = """= control target key start
LB: loop body
= control target key end

     0   :  { %s9_s0 = inlined_call_operand.vmem [shape: bf16[SIZE,8], index: 0, kind: input, shape index: {}] \
/* operand 0 */  ;;  %s9_s1 = inlined_call_operand.hbm [shape: f32[8], index: 1, kind: input, shape index: {}]  ;;  \
%s9_s2 = inlined_call_operand.vmem [shape: bf16[SIZE,8], index: 2, kind: output, shape index: {}] } \
/* entry bundle: %fusion.1 = fusion(%x, /*index=5*/%y.2) */
   0x1   :  { %v1 = vld [vmem:[%s9_s0] sm:$0xff] }
"""
LOOP = "".join(
    f"   0x{number + 2:x}{mark:>3}: > {{ {text} }}\n"
    for number, (mark, text) in enumerate(
        [
            ("LB", "%s2 = sphi /* Start region 9 */"),
            ("", "%4 = sbr.rel (%p1) target = $region3"),  # around a trip's work
            *[("", "%v2 = vadd %v1, %v1")] * 10,
            ("", "%5 = sbr.rel (%p2) target = $region5"),  # what only some trips need
            *[("", "%v3 = vadd %v1, %v1")] * 10,
            ("PF", "%6 = smov 1 /* Start/End empty region 5 :: Start/End empty region 3 */"),
            ("", "%7 = sbr.rel (!%p3) target = $region9"),
        ]
    )
)
BOTH = {size: (f"bf16[{size},8]", "f32[8]", f"bf16[{size},8]") for size in (32, 64)}
IN_LOOP, SELDOM = 25, 6  # the four bundles after a branch run always


@pytest.mark.parametrize("before", ["--xla_a=1", None])
def test_libtpu_is_told_to_write_them_as_long_as_they_are_wanted(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    else:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", before)
    with finished_programs():
        told = os.environ["LIBTPU_INIT_ARGS"].split()
        (folder,) = (Path(flag.partition("=")[2]) for flag in told if flag.startswith("--xla_jf_dump_to="))
        assert folder.is_dir()
        assert set(told) > {"--xla_jf_dump_llo_text=true", *filter(None, [before])}
    assert os.environ.get("LIBTPU_INIT_ARGS") == before
    assert not folder.exists()


@pytest.fixture
def schedules(tmp_path: Path) -> Schedules:
    return Schedules(tmp_path)


def test_each_operation_has_the_program_of_its_operands(schedules: Schedules, tmp_path: Path) -> None:
    (tmp_path / "11-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "64") + LOOP)
    (tmp_path / "12-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "32"))
    (tmp_path / "12-fusion.1-00-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles: 2\n")
    (tmp_path / "13-fusion.10-01-final_bundles.txt").write_text("")  # still being written
    schedules.read()
    assert schedules.of("fusion.1", ("x", "y.2"), BOTH[64]) == Schedule(1, IN_LOOP - SELDOM, SELDOM)
    assert schedules.of("fusion.1", ("x", "y.2"), BOTH[32]) == Schedule(once=1, each=0)
    assert schedules.of("fusion.1", ("x", "z"), BOTH[64]) is None
    assert schedules.of("fusion.10", ("x", "y.2"), BOTH[64]) is None
    (tmp_path / "14-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "32") + LOOP)
    schedules.read()
    assert schedules.of("fusion.1", ("x", "y.2"), BOTH[32]) is None  # two that differ
    schedules.forget()
    assert not list(tmp_path.iterdir())


def test_a_loop_in_a_loop_is_left_to_libtpus_model(schedules: Schedules, tmp_path: Path) -> None:
    """No text says how often the inner one runs."""
    inner = "   0x90   : >> { %v2 = vadd %v1, %v1 }\n"
    (tmp_path / "1-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "64") + LOOP + inner)
    schedules.read()
    assert schedules.of("fusion.1", ("x", "y.2"), BOTH[64]) is None

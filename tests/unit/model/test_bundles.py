"""Bundles counted in the text of a kernel's program."""

from scripts.planning.bundles import loops

PROGRAM = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
{GRID} LB: > { %s2 = smov 0 }
  0x12 LB: >> { %copies a row }
  0x13   : >> { %two bundles }
{PREDICATED} PF: > { %s3 = smov 0 }
  0x20 LB: >> { %first }
{FOLD}
  0x30 PF: > { %done }
  0x31   : > { %no loop }
"""


def test_a_fold_is_a_loop_of_the_grid_s_loop_that_does_more_than_copy() -> None:
    body = "\n".join(f"  {0x100 + number:#x}   : >> {{ %multiplies }}\n comment of %a :: >> b" for number in range(250))
    program = PROGRAM.replace("{GRID}", "  0x10").replace("{PREDICATED}", "  0x1f").replace("{FOLD}", body)
    assert list(loops(program)) == [251]
    assert list(loops(program + program)) == [251, 251]

"""How files are cut into parts."""

from hrmtext.data.parts import PART_BYTES, part_bytes_for


def test_a_file_is_cut_so_that_every_worker_has_eight_parts():
    mib = 1 << 20
    assert part_bytes_for(160 * mib, 4) == 5 * mib
    assert part_bytes_for(4_000 * mib, 4) == PART_BYTES
    assert part_bytes_for(1 * mib, 4) == 2 * mib, "small files stay whole"

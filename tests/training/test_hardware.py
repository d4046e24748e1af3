"""What a process says and refuses of its cores and its GPU."""

from __future__ import annotations

import os

import pytest
import torch

from training.config import UserError
from training.hardware import (
    Gpu,
    check_one_each,
    check_visible,
    hardware_lines,
    process_cores,
)

CPU = torch.device("cpu")


def test_cores_that_were_given_are_not_divided_again(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCKSTEP_CORES", "3")
    assert process_cores() == 3
    monkeypatch.delenv("LOCKSTEP_CORES")
    assert process_cores() == max(1, len(os.sched_getaffinity(0)) // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "999")
    assert process_cores() == 1


@pytest.mark.parametrize(("visible", "processes"), [(1, 1), (8, 8), (8, 1), (1, 8)])
def test_a_gpu_each_or_one_of_its_own_for_each_passes(visible, processes):
    check_visible(visible, processes)


@pytest.mark.parametrize(("visible", "processes"), [(2, 3), (7, 8)])
def test_fewer_gpus_than_processes_are_refused_with_both_numbers(visible, processes):
    with pytest.raises(UserError, match=f"^{processes} processes on this machine, which has {visible} GPUs"):
        check_visible(visible, processes)


def gpus(*identities, host="n1"):
    return [Gpu(host, "NVIDIA H200 (cuda:0)", identity) for identity in identities]


def test_two_processes_on_one_gpu_are_refused_with_their_numbers_and_the_gpu():
    with pytest.raises(UserError) as caught:
        check_one_each([*gpus("a", "b"), *gpus("c", "b", host="n2")])
    assert caught.value.code == "USAGE"
    assert caught.value.what == "processes 1 and 3 on n2 use the same GPU: NVIDIA H200 (cuda:0), b"


def test_gpus_of_their_own_pass_and_so_do_those_that_nobody_can_tell_apart():
    check_one_each(gpus("a", "b", "c"))
    check_one_each(gpus("MIG-1", "MIG-2"))
    check_one_each(gpus("", ""))


def test_one_process_on_a_cpu_says_its_cores_and_threads_and_no_more():
    cores, threads = process_cores(), torch.get_num_threads()
    (line,) = hardware_lines(CPU, {"GLOO_SOCKET_IFNAME": "eth0"})
    assert line == f"{cores} core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)}"


def test_several_processes_of_one_machine_say_what_each_has(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CORES", "3")
    (line,) = hardware_lines(CPU, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"})
    assert line.startswith("3 cores, ")
    assert line.endswith(" a process")

"""The program, from its command line to its exit code: read this page first, then the modules that it names.

Command: accelerate launch training/run.py [train|evaluate|predict] [--config RECIPE|FILE] [--NAME VALUE ...]
"""

import os
import sys

# Started as a file, Python puts training/ at the head of sys.path, where the repository belongs. Only os and
# sys may be imported before that is mended: a module beside this file could shadow one of Python's.
if not __package__:
    _here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != _here]
    sys.path.insert(0, os.path.dirname(_here))  # noqa: PTH120

if __name__ == "__main__":
    import signal

    # Ctrl-C while the modules below are loaded ends it like any program, without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from data_pipeline import torchvision_cpu
    from launch import cores, open_files, rendezvous, srun_tie, started, ties, topology
    from training import command, early_signals, process

    with process.last_words() as place:
        early_signals.stop_before_training(sys.argv[1:], place)
        os.environ.update(topology.of_slurm_task(os.environ))
        place.find_rank()
        request = command.read_request(sys.argv[1:])  # no torch yet: a misspelt flag is answered at once
        if request is not None:
            place.run_dir = request.run_dir
            ties.tie_to_launcher()
            srun_tie.tie_to_srun()
            started.check_launch(request.flags.expect_processes, sys.argv[1:])
            cores.take_cores(os.environ)  # before torch counts them
            open_files.allow_open_files()
            place.listener = rendezvous.meet(os.environ)
            # For a checkout that runs without being installed: timm imports torchvision.
            torchvision_cpu.declare_missing_operators()

            if request.mode == "predict":
                from training import predict_mode

                predict_mode.predict_with_weights(request, place)
            elif request.mode == "evaluate":
                from training import evaluate_mode

                evaluate_mode.evaluate_weights(request, place)
            else:
                from training import assembly, loop, reading, rehearsal, run_directory
                from training.vigil import joining

                dataset = reading.open_dataset(request.config, learning=True)
                accelerator = assembly.join(request.config, learning=True, place=place)
                compiles = request.config.model.compile
                joining.watch_over(place, accelerator, request.config, compiles=compiles)
                if request.flags.dry_run:
                    rehearsal.rehearse(request, accelerator, dataset)
                else:
                    start = run_directory.start_run(request, accelerator, dataset)
                    job = assembly.assemble(
                        request,
                        accelerator,
                        dataset,
                        checkpoint=start.checkpoint,
                        progress=start.progress,
                        place=place,
                    )
                    loop.train(job, start)
                process.leave(accelerator, place)

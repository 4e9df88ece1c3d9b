"""The scripts that run m2l2 elsewhere: what a dry run prints is what is run, with stand-ins for gcloud and the like."""

import importlib
import os
from pathlib import Path
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch import install
from m2l2.training import main
import m2l2.training.loop

LAUNCH = Path(__file__).parent.parent / 'launch'
FLAGS = ['--config=configs/base.py', '--config.data.root=gs://bucket/my "good" music', "--workdir=gs://bucket/it's"]
MOUNTED = ['--config=configs/base.py', '--config.data.root=/mnt/m2l2-data/my "good" music', "--workdir=/mnt/m2l2/it's",
           '--multihost', '--stopped_exit_code=75']
TPU = ['--name=base', '--type=v5litepod-256', '--zone=us-west4-a', '--project=p']
GKE = ['--name=base', '--image=registry/m2l2:tpu', '--type=v5e', '--topology=16x16']

RECORD = r'''#!/bin/bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
case "$*" in *'apply -f -'*) cat > "$CALLS.stdin" ;; esac
while IFS=$'\t' read -r part answers; do  # part of a call, and an answer a time, the last one for ever
  [[ -n $part && "$*" == *"$part"* ]] || continue
  echo >> "$CALLS.${part// /-}"
  IFS=, read -ra answers <<< "$answers,"
  count=$(wc -l < "$CALLS.${part// /-}")
  answer=${answers[count <= ${#answers[@]} ? count - 1 : ${#answers[@]} - 1]}
  case $answer in [0-9]*) exit "$answer" ;; *) echo "$answer" ;; esac
done <<< "$ANSWERS"
exit 0
'''


class Place:
  """A PATH in which the cloud's commands are stand-ins that note their arguments."""

  def __init__(self, folder):
    self.calls_file = folder / 'calls'
    self.environment = {
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'CALLS': str(self.calls_file), 'HOME': str(folder),
      'TMPDIR': str(folder), 'M2L2_PYTHON': str(folder / 'none')}
    (folder / 'bin').mkdir()
    for name in ('gcloud', 'kubectl', 'sbatch', 'srun', 'scontrol', 'git'):
      self.command(name, RECORD)

  def command(self, name, text):
    path = Path(self.environment['PATH'].partition(':')[0]) / name
    path.write_text(text)
    path.chmod(0o755)

  def run(self, script, *arguments, answers=None, **more):
    lines = (f'{part}\t{answer}' for part, answer in (answers or {}).items())
    environment = {**self.environment, 'ANSWERS': '\n'.join(lines), **more}
    return subprocess.run(['bash', next(LAUNCH.rglob(script)), *arguments], env=environment, text=True,
                          capture_output=True, check=False, timeout=60)

  def calls(self):
    """What was called so far, without looks at this checkout; forgets it."""
    lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
    self.calls_file.unlink(missing_ok=True)
    calls = [shlex.split(line) for line in lines]
    return [call for call in calls if call[:2] not in (['git', 'rev-parse'], ['git', 'diff'])]


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path)


def printed(result):
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


HIERARCHICAL = {'buckets describe': 'True'}


@pytest.mark.parametrize('script', sorted(path.name for path in LAUNCH.rglob('*.sh')))
def test_every_script_is_sound_bash(script):
  checked = subprocess.run(['bash', '-n', next(LAUNCH.rglob(script))], capture_output=True, text=True, check=False)
  assert checked.returncode == 0 and not checked.stderr


@pytest.mark.parametrize('script', ['tpu.sh', 'gke.sh', 'slurm.sh', 'restart.sh'])
def test_help_needs_nothing_and_shows_a_call(script, place):
  result = place.run(script, '--help')
  assert result.returncode == 0 and f'launch/cloud/{script} ' in result.stdout and not place.calls()


# ---- what a dry run prints is what is run --------------------------------------------------------


@pytest.mark.parametrize('script, arguments', [
  ('tpu.sh', ['create', *TPU]),
  ('tpu.sh', ['create', *TPU, '--slices=4', '--spot', '--network=n', '--internal-ip']),
  ('tpu.sh', ['setup', *TPU]),
  ('tpu.sh', ['run', *TPU, '--internal-ip', '--', *FLAGS]),
  ('tpu.sh', ['status', *TPU]),
  ('tpu.sh', ['logs', *TPU]),
  ('tpu.sh', ['stop', *TPU]),
  ('tpu.sh', ['delete', *TPU]),
  ('slurm.sh', ['--nodes=4', '--python=/bin/true', '--partition=a', '--', '--config=c.py', '--workdir=/data/run 1']),
])
def test_a_dry_run_prints_what_is_run(script, arguments, place):
  command, *rest = arguments
  would = printed(place.run(script, command, '--dry-run', *rest))
  assert would and not place.calls()
  result = place.run(script, *arguments, answers=HIERARCHICAL)
  assert result.returncode == 0, result.stderr
  did = place.calls()
  if script == 'slurm.sh':  # its second line is the job's own
    assert would.pop()[0] == 'srun'
  assert did == would


@pytest.mark.parametrize('page, devices', [
  ('README.md', 256), ('launch/cloud/tpu.sh', 256), ('launch/cloud/gke.sh', 512), ('launch/cloud/slurm.sh', 32)])
def test_the_batch_of_a_pods_command_divides_among_its_devices(page, devices):
  text = (LAUNCH.parent / page).read_text().replace('\\\n', ' ')
  command = re.findall(r'launch/cloud/\w+\.sh .*--config=configs/.*', text)[-1]
  config = importlib.import_module('m2l2.configs.' + re.search(r'configs/(\w+)\.py', command)[1]).get_config()
  batch = re.search(r'--config\.train\.batch_size=(\d+)', command)
  assert (int(batch[1]) if batch else config.train.batch_size) % devices == 0


@pytest.mark.parametrize('script, arguments, devices, looks', [
  ('tpu.sh', ['run', *TPU, '--', *FLAGS], 256, 'config'),
  ('tpu.sh', ['run', '--name=a', '--type=v5p-64', '--slices=2', '--', *FLAGS], 64, 'config'),
  ('gke.sh', [*GKE, '--slices=2', '--', *FLAGS], 512, 'config'),
  ('slurm.sh', ['--nodes=4', '--gpus=8', '--', '--config=c.py', '--workdir=/data/run'], 32, 'all'),
])
def test_a_dry_run_checks_the_flags_of_training(script, arguments, devices, looks, place, tmp_path):
  asked = tmp_path / 'asked'
  place.command('checked', f'#!/bin/bash\necho "$JAX_NUM_CPU_DEVICES $JAX_PLATFORMS $*" >> {asked}\nexit $ENDS\n')
  python = str(tmp_path / 'bin' / 'checked')
  options, flags = arguments[:arguments.index('--')], arguments[arguments.index('--'):]
  assert place.run(script, *options, '--dry-run', *flags, M2L2_PYTHON=python, ENDS='0').returncode == 0
  assert asked.read_text().startswith(f'{devices} cpu -m m2l2 train --config=')
  assert asked.read_text().endswith(f' --check={looks}\n') and '--multihost' not in asked.read_text()
  failed = place.run(script, *options, '--dry-run', *flags, M2L2_PYTHON=python, ENDS='1')
  assert failed.returncode == 1 and 'm2l2 train would not run so' in failed.stderr
  asked.unlink()
  place.run(script, *options, *flags, M2L2_PYTHON=python, ENDS='1')
  assert not asked.exists()  # a real call's flags are checked where it runs


def test_tpu_create_asks_for_one_slice_or_several(place):
  [line] = printed(place.run('tpu.sh', 'create', '--dry-run', *TPU))
  assert line == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'base', '--zone=us-west4-a', '--project=p',
                  '--node-id=base', '--accelerator-type=v5litepod-256', '--runtime-version=v2-alpha-tpuv5-lite',
                  '--scopes=https://www.googleapis.com/auth/cloud-platform']
  [four] = printed(place.run('tpu.sh', 'create', '--dry-run', *TPU, '--slices=4', '--spot', TPU_ZONE='elsewhere'))
  assert {'--node-count=4', '--node-prefix=base', '--spot', '--zone=us-west4-a'} <= set(four)
  assert not any(word.startswith('--node-id') for word in four)
  [plain] = printed(place.run('tpu.sh', 'create', '--dry-run', TPU_NAME='n', TPU_TYPE='v6e-8', TPU_ZONE='z'))
  assert {'n', '--accelerator-type=v6e-8', '--runtime-version=v2-alpha-tpuv6e', '--zone=z'} <= set(plain)


def test_flags_reach_the_workers_as_they_were_given(place):
  look, start = printed(place.run('tpu.sh', 'run', '--dry-run', *TPU, '--', *FLAGS))
  assert look[:5] == ['gcloud', 'storage', 'buckets', 'describe', 'gs://bucket']
  assert '--worker=all' in start and '--node=all' in start
  [command] = [word.removeprefix('--command=') for word in start if word.startswith('--command=')]
  assert shlex.split(command) == ['bash', 'm2l2/launch/cloud/worker.sh', 'start', 'bucket', 'bucket', *MOUNTED]


def test_data_may_lie_in_a_bucket_of_their_own(place):
  flags = ['--config.data.root=gs://music/all', '--workdir=gs://runs/a']
  look, start = printed(place.run('tpu.sh', 'run', '--dry-run', *TPU, '--', *flags))
  assert look[4] == 'gs://runs'  # where nothing is written, nothing can be torn
  assert any("start runs music --config.data.root=/mnt/m2l2-data/all --workdir=/mnt/m2l2/a" in word for word in start)


def test_a_flat_bucket_is_refused(place):
  for answer in ('', 'False', '1'):
    result = place.run('tpu.sh', 'run', *TPU, '--', *FLAGS, answers={'buckets describe': answer})
    assert result.returncode == 1 and 'gs://bucket' in result.stderr
    assert [call[1] for call in place.calls()] == ['storage']


def test_keep_asks_anew_after_preemption_and_ends_with_training(place):
  result = place.run('tpu.sh', 'keep', *TPU, '--spot', '--poll=1', '--', *FLAGS, answers=HIERARCHICAL | {
    'queued-resources list': ',PROVISIONING,SUSPENDED,ACTIVE',
    'outcome': 'absent,running,done'}, PATH=_instant_sleep(place))
  assert result.returncode == 0 and 'training has ended' in result.stderr
  calls = [' '.join(call) for call in place.calls()]
  kinds = [kind for call in calls for kind in (
    ' create ', ' delete ', ' scp ', 'worker.sh setup', 'worker.sh start', 'outcome') if kind in call]
  assert kinds == [' create ', ' delete ', ' create ', 'outcome', ' scp ', 'worker.sh setup', 'worker.sh start',
                   'outcome', 'outcome']
  assert all('--spot' in call for call in calls if ' create ' in call)


def test_keep_gives_up(place):
  never = place.run('tpu.sh', 'keep', *TPU, '--poll=1', '--recreations=3', '--', *FLAGS,
                    answers=HIERARCHICAL | {'queued-resources list': 'FAILED'}, PATH=_instant_sleep(place))
  assert never.returncode == 1 and 'asked for base 3 times' in never.stderr
  assert sum('create' in call for call in place.calls()) == 3
  failed = place.run('tpu.sh', 'keep', *TPU, '--', *FLAGS, answers=HIERARCHICAL | {
    'queued-resources list': 'ACTIVE', 'outcome': 'failed'})
  assert failed.returncode == 1 and 'launch/cloud/tpu.sh logs' in failed.stderr


def test_a_dry_keep_names_every_step(place):
  would = printed(place.run('tpu.sh', 'keep', '--dry-run', *TPU, '--', *FLAGS))
  assert [' '.join(call[1:5]).removeprefix('compute tpus queued-resources ') for call in would] == [
    'list', 'create', 'ssh', f'archive --format=tar.gz {would[3][3]} HEAD', 'scp', 'ssh',
    'storage buckets describe gs://bucket', 'ssh']
  assert not place.calls()


def _instant_sleep(place):
  place.command('sleep', '#!/bin/sh\n')
  return place.environment['PATH']


# ---- GKE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, hosts, chips, accelerator', [
  (['--type=v5e', '--topology=16x16'], 64, 4, 'tpu-v5-lite-podslice'),
  (['--type=v5p', '--topology=4x8x8'], 64, 4, 'tpu-v5p-slice'),
  (['--type=v6e', '--topology=16x16', '--slices=2'], 64, 4, 'tpu-v6e-slice'),
  (['--type=v5e', '--topology=2x4', '--chips-per-host=8', '--spot'], 1, 8, 'tpu-v5-lite-podslice'),
  (['--type=v6e', '--topology=1x1'], 1, 1, 'tpu-v6e-slice'),
])
def test_the_manifest_fits_the_slice(options, hosts, chips, accelerator, place):
  result = place.run('gke.sh', *GKE, *options, '--dry-run', '--', *FLAGS)
  assert result.returncode == 0 and '@' not in result.stdout and not place.calls()
  manifest = yaml.safe_load(result.stdout)
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  [slices] = manifest['spec']['replicatedJobs']
  job, pod = slices['template']['spec'], slices['template']['spec']['template']['spec']
  [container] = pod['containers']
  selector = pod['nodeSelector']
  given = dict(option.removeprefix('--').split('=') for option in options if '=' in option)
  sides = [int(side) for side in selector['cloud.google.com/gke-tpu-topology'].split('x')]
  total = 1
  for side in sides:
    total *= side
  assert selector['cloud.google.com/gke-tpu-topology'] == given['topology']
  assert selector['cloud.google.com/gke-tpu-accelerator'] == accelerator
  assert job['parallelism'] == job['completions'] == hosts and hosts * chips == total
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert slices['replicas'] == int(given.get('slices', 1))
  spot = 'cloud.google.com/gke-spot'
  assert (spot in selector) == (spot in str(pod['tolerations'])) == ('--spot' in options)


def test_the_manifest_restarts_and_mounts(place):
  manifest = yaml.safe_load(place.run('gke.sh', *GKE, '--grace=900', '--dry-run', '--', *FLAGS).stdout)
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  pod, [container] = job['template']['spec'], job['template']['spec']['containers']
  assert container['args'] == ['train', *MOUNTED]
  assert pod['terminationGracePeriodSeconds'] == 900 and pod['restartPolicy'] == 'Never'
  # JobSet lets what podFailurePolicy ends go without a restart counted, and that needs its container's name.
  assert manifest['spec']['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  codes = job['podFailurePolicy']['rules'][0]['onExitCodes']
  assert codes['containerName'] == container['name'] and codes['values'] == [75]
  assert job['backoffLimit'] == 0 and job['completionMode'] == 'Indexed'
  volumes = {volume['name']: volume for volume in pod['volumes']}
  mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
  assert volumes.keys() == mounts.keys() and mounts['bucket'] == '/mnt/m2l2'
  assert volumes['bucket']['csi']['volumeAttributes']['bucketName'] == 'bucket'
  data = volumes['data']['csi']
  assert data['readOnly'] and data['volumeAttributes']['mountOptions'].split(',')[:3] == [
    'implicit-dirs', 'metadata-cache:ttl-secs:-1', 'metadata-cache:stat-cache-max-size-mb:-1']
  local = place.run('gke.sh', *GKE, '--dry-run', '--', '--config=c.py', '--workdir=gs://bucket/run').stdout
  assert 'm2l2-data' not in local and 'data' not in {volume['name'] for volume in yaml.safe_load(local)['spec'][
    'replicatedJobs'][0]['template']['spec']['template']['spec']['volumes']}
  assert job['template']['metadata']['annotations'] == {'gke-gcsfuse/volumes': 'true'}


def test_the_manifest_that_is_shown_is_applied(place):
  shown = place.run('gke.sh', *GKE, '--dry-run', '--', *FLAGS).stdout
  result = place.run('gke.sh', *GKE, '--', *FLAGS, answers=HIERARCHICAL)
  assert result.returncode == 0, result.stderr
  assert [call[0] for call in place.calls()] == ['gcloud', 'kubectl']
  assert Path(f'{place.calls_file}.stdin').read_text() == shown


# ---- Slurm ---------------------------------------------------------------------------------------


def test_slurm_has_one_process_for_each_gpu(place):
  submit, step = printed(place.run('slurm.sh', '--nodes=2', '--gpus=4', '--image=m2l2:cuda', '--mounts=/data:/data',
                                   '--dry-run', '--', '--config=c.py', '--workdir=/data/run 1'))
  assert {'--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4', '--requeue', '--signal=TERM@300'} <= set(submit)
  [cpus] = [flag for flag in submit if flag.startswith('--cpus-per-task=')]
  assert step == ['srun', '--kill-on-bad-exit=1', '--gpu-bind=none', cpus, '--container-image=m2l2:cuda',
                  '--container-mounts=/data:/data', 'python', '-m', 'm2l2', 'train', '--config=c.py',
                  '--workdir=/data/run 1', '--multihost', '--stopped_exit_code=75']


@pytest.mark.parametrize('code, restarts, requeued, ends', [
  (0, 0, False, 0), (75, 0, True, 0), (75, 50, True, 0), (1, 0, True, 0), (1, 2, False, 1)])
def test_a_slurm_job_goes_back_into_the_queue_until_it_is_done(code, restarts, requeued, ends, place):
  result = place.run('slurm.sh', 'batch', '--attempts=3', '--', '--config=c.py', '--workdir=w', answers={
    'm2l2 train': code}, SLURM_JOB_ID='7', SLURM_RESTART_COUNT=str(restarts))
  calls = place.calls()
  assert result.returncode == ends, result.stderr
  assert calls[0][0] == 'srun' and calls[1:] == [['scontrol', 'requeue', '7']] * requeued


# ---- restarts ------------------------------------------------------------------------------------


TRAINS = '''#!/bin/sh
echo "$@" >> "$CALLS.trained"
code=$(sed -n "$(wc -l < "$CALLS.trained")p" "$CALLS.codes")
exit "${code:-1}"
'''


@pytest.mark.parametrize('codes, attempts, ends', [
  ([0], 1, 0), ([1, 137, 0], 3, 0), ([75] * 5 + [0], 6, 0), ([], 4, 1), ([1, 1, 1, 75, 1, 1, 0], 7, 0)])
def test_restarts_until_done_or_hopeless(codes, attempts, ends, place):
  place.command('m2l2', TRAINS)
  Path(f'{place.calls_file}.codes').write_text(''.join(f'{code}\n' for code in codes))
  result = place.run('restart.sh', 'm2l2', 'train', '--workdir=a b', ATTEMPTS='4', FIRST_WAIT='0')
  assert result.returncode == ends, result.stderr
  assert Path(f'{place.calls_file}.trained').read_text() == 'train --workdir=a b\n' * attempts


def test_a_restart_loop_passes_the_signal_on_and_waits_for_the_save(place, tmp_path):
  place.command('m2l2', '''#!/bin/bash
trap 'sleep .3; echo saved > saved; exit 75' TERM
touch started
while :; do sleep .05; done
''')
  loop = subprocess.Popen(['bash', LAUNCH / 'cloud' / 'restart.sh', 'm2l2'], env=place.environment, cwd=tmp_path,
                          stderr=subprocess.DEVNULL)
  until = time.monotonic() + 20
  while not (tmp_path / 'started').exists() and time.monotonic() < until:
    time.sleep(.02)
  loop.send_signal(signal.SIGTERM)
  assert loop.wait(timeout=20) == 0
  assert (tmp_path / 'saved').exists()


@pytest.mark.parametrize('done, flags, code', [
  (3, [], 0), (2, [], 0), (3, ['--stopped_exit_code=75'], 0), (2, ['--stopped_exit_code=75'], 75)])
def test_a_stopped_run_can_be_told_from_one_that_is_done(done, flags, code, monkeypatch):
  monkeypatch.setattr(m2l2.training.loop, 'train', lambda config, workdir: done)
  assert main.main(['m2l2', '--config=configs/nano.py:debug', '--config.train.steps=3', '--workdir=w', *flags]) == code


# ---- what a worker does --------------------------------------------------------------------------


def test_a_worker_mounts_the_bucket_and_starts_the_service(place, tmp_path):
  for name in ('systemctl', 'mount', 'apt-get', 'gcsfuse', 'mkdir-mount'):
    place.command(name, RECORD)
  place.command('mountpoint', '#!/bin/sh\nexit 1\n')
  # Files of the system land in the home of this test.
  place.command('sudo', '#!/bin/bash\ncase $1 in\n  tee) exec tee ${3:+-a} "$HOME/$(basename "${!#}")";;\n'
                '  mkdir) ;;\n  *) exec "$@";;\nesac\n')
  result = place.run('worker.sh', 'start', 'bucket', 'music', '--workdir=/mnt/m2l2/a b', '--multihost')
  assert result.returncode == 0, result.stderr
  assert [call for call in place.calls() if call[0] == 'mount'] == [['mount', '/mnt/m2l2'], ['mount', '/mnt/m2l2-data']]
  written, read = [line.split() for line in (tmp_path / 'fstab').read_text().splitlines()]
  assert written[:3] == ['bucket', '/mnt/m2l2', 'gcsfuse'] and read[:3] == ['music', '/mnt/m2l2-data', 'gcsfuse']
  assert {'rw', 'metadata_cache_ttl_secs=0'} < set(written[3].split(','))
  assert {'ro', 'metadata_cache_ttl_secs=-1', 'stat_cache_max_size_mb=-1'} < set(read[3].split(','))
  unit = (tmp_path / 'm2l2.service').read_text()
  assert 'KillMode=mixed' in unit and f'ExecStart=/bin/bash {tmp_path}/m2l2-run/train.sh' in unit
  last = shlex.split((tmp_path / 'm2l2-run' / 'train.sh').read_text().splitlines()[-1])
  assert last == ['exec', str(LAUNCH / 'cloud' / 'restart.sh'), f'{tmp_path}/m2l2-venv/bin/m2l2', 'train',
                  '--workdir=/mnt/m2l2/a b', '--multihost']


@pytest.mark.parametrize('mounted, code', [('bucket', 0), ('another', 1)])
def test_a_worker_never_takes_another_bucket_for_its_own(mounted, code, place):
  place.command('mountpoint', '#!/bin/sh\nexit 0\n')
  place.command('findmnt', f'#!/bin/sh\necho {mounted}\n')
  for name in ('systemctl', 'sudo', 'mount'):
    place.command(name, RECORD)
  result = place.run('worker.sh', 'start', 'bucket', '-', '--workdir=/mnt/m2l2/a')
  assert result.returncode == code
  if code:
    assert 'holds gs://another' in result.stderr and not place.calls()


@pytest.mark.parametrize('load, active, says', [
  ('not-found', 'inactive', 'absent'), ('loaded', 'active', 'running'), ('loaded', 'deactivating', 'running'),
  ('loaded', 'inactive', 'done'), ('loaded', 'failed', 'failed')])
def test_a_worker_tells_how_training_stands(load, active, says, place):
  place.command('systemctl', f'#!/bin/sh\necho {load}\necho {active}\n')
  assert place.run('worker.sh', 'outcome').stdout == f'{says}\n'


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize('script, arguments, says', [
  ('tpu.sh', [], 'which command'),
  ('tpu.sh', ['fly', *TPU], 'fly'),
  ('tpu.sh', ['create', '--name=x'], '--type'),
  ('tpu.sh', ['create', '--type=v5p-8'], '--name'),
  ('tpu.sh', ['create', *TPU, '--slices=0'], '--slices=0'),
  ('tpu.sh', ['create', *TPU, '--type=v9-8'], 'v9-8'),
  ('tpu.sh', ['create', *TPU, '--zone='], '--zone needs a value'),
  ('tpu.sh', ['create', *TPU, '--nope'], '--nope'),
  ('tpu.sh', ['create', *TPU, '--', *FLAGS], 'no flags of m2l2 train'),
  ('tpu.sh', ['run', *TPU], '--workdir'),
  ('tpu.sh', ['run', *TPU, '--', '--config=gs://a/c.py', '--workdir=gs://b/run'], 'another bucket'),
  ('tpu.sh', ['run', *TPU, '--', '--config.data.root=gs://a/c', '--config.evaluate.root=gs://b/c'], 'another bucket'),
  ('tpu.sh', ['run', *TPU, '--', '--workdir=gs://bucket'], 'no folder'),
  ('tpu.sh', ['run', *TPU, '--', '--workdir=w', '--multihost'], '--multihost'),
  ('gke.sh', ['--name=x'], '--image'),
  ('gke.sh', [*GKE, '--type=v7', '--', *FLAGS], 'v7'),
  ('gke.sh', [*GKE, '--topology=4x4x4', '--', *FLAGS], '3 axes'),
  ('gke.sh', [*GKE, '--topology=2x5', '--', *FLAGS], 'does not divide'),
  ('gke.sh', [*GKE, '--name=No_No', '--', *FLAGS], 'No_No'),
  ('gke.sh', [*GKE, '--', '--workdir=/data/run'], 'gs://'),
  ('gke.sh', [*GKE, '--', '--workdir=gs://b/r', '--config=a\nb'], 'control character'),
  ('slurm.sh', ['--gpus=some', '--', '--workdir=w'], '--gpus=some'),
  ('slurm.sh', ['--', '--workdir=gs://b/r'], 'gs://b'),
  ('slurm.sh', ['--nope'], '--nope'),
  ('slurm.sh', ['--python=/nowhere/python', '--', '--workdir=w'], '/nowhere/python'),
])
def test_a_mistake_is_one_clear_line(script, arguments, says, place):
  result = place.run(script, *arguments)
  assert result.returncode == 1 and not result.stdout
  assert len(result.stderr.splitlines()) == 1 and says in result.stderr, result.stderr
  assert not place.calls()


# ---- installing ----------------------------------------------------------------------------------


def test_uv_is_told_what_pip_is_set_to():
  listed = ("global.index-url='https://user@mirror/simple'\nglobal.constraint='/etc/c.txt'\n"
            ":env:.proxy='http://proxy:1'\nglobal.extra-index-url='\\nhttps://a\\nhttps://b'\n"
            "install.constraint='/home/c.txt'\n"
            "global.no-index='false'\nglobal.cert='/ca.pem'\n:env:.no-input='1'\ndownload.pre='1'\n")
  options, variables = install.for_uv(install.pip_settings(listed))
  assert options == ['--index=https://user@mirror/simple', '--default-index=https://user@mirror/simple',
                     '--constraint=/home/c.txt', '--index=https://a', '--index=https://b']
  assert variables == {'SSL_CERT_FILE': '/ca.pem', 'HTTPS_PROXY': 'http://proxy:1', 'HTTP_PROXY': 'http://proxy:1'}
  with pytest.raises(ValueError, match='require-hashes'):
    install.for_uv(install.pip_settings("install.require-hashes='1'"))


@pytest.mark.parametrize('listed, uv, calls', [
  ('', {}, ['pip config', 'pip install', 'uv pip']),
  ('', {'pip install': 1}, ['pip config', 'pip install', 'pip install']),
  ('', {'uv pip': 2}, ['pip config', 'pip install', 'uv pip', 'pip install']),
  ("global.require-hashes='1'", {}, ['pip config', 'pip install'])])
def test_pip_does_what_uv_cannot(listed, uv, calls, monkeypatch):
  called = []

  class Process:  # stands for both ways to start one
    def __init__(self, command, **_):
      called.append(' '.join(command[2:4]))
      self.stdout = listed if called[-1] == 'pip config' else []
      self.returncode = 0 if '--editable' in command and called[-1] == 'pip install' else uv.get(called[-1], 0)

    __enter__, __exit__ = lambda self: self, lambda self, *_: None

  monkeypatch.setattr(install.subprocess, 'run', Process)
  monkeypatch.setattr(install.subprocess, 'Popen', Process)
  assert install.main('.[train]') == 0 and called == calls


def test_the_container_is_built_from_what_is_sent():
  sent = [line[1:] for line in (LAUNCH.parent / '.dockerignore').read_text().splitlines() if line.startswith('!')]
  assert all((LAUNCH.parent / name).exists() for name in sent)
  assert {'m2l2', 'configs', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'} <= set(sent)
  lines = (LAUNCH / 'Containerfile').read_text().splitlines()
  assert lines.index('USER m2l2') > next(i for i, line in enumerate(lines) if line.startswith('RUN'))
  assert 'ENTRYPOINT ["m2l2"]' in lines


def test_the_scripts_of_the_soak_start():
  """Each by itself finds what it imports: a script has its own folder in its path, and not the tests'."""
  names = re.findall(r'tests/soak/(\w+)\.py', (LAUNCH / 'test.sh').read_text())
  assert len(names) == 4
  code = f"""
import sys
path = list(sys.path)
for name in {names}:
  __import__(name)
  sys.path[:] = path  # what one adds must not serve the next
  for module in [module for module in sys.modules if module.startswith('test_')]:
    del sys.modules[module]
"""
  subprocess.run([sys.executable, '-c', code], cwd=LAUNCH.parent / 'tests/soak', check=True,
                 env={**os.environ, 'PYTHONPATH': str(LAUNCH.parent)})

"""A fake gcloud: stores its slices in $FAKE_GCLOUD/world.json and logs every call in $FAKE_GCLOUD/calls.jsonl.

Keys of world.json:
    request, node   states of the queued resource and of the TPU VM; a missing key: it does not exist
    queue           next states of a new queued resource, one for each call of describe; ACTIVE creates the TPU VM
    create_errors   messages with which the next calls of create fail
    describe_fails  number of calls of describe that fail, after describe_works calls that work
    setups, runs    results of the next calls of on_worker.sh: the exit status of one host or the statuses of several,
                    and the keys of world.json that change
"""

import argparse
import json
import os
import sys
from typing import NoReturn

HOME = os.environ['FAKE_GCLOUD']
UNUSABLE = ('PREEMPTED', 'TERMINATED', 'STOPPED')


def main(arguments: list[str]) -> int:
    with open(f'{HOME}/calls.jsonl', 'a') as log:
        log.write(json.dumps(arguments) + '\n')
    path = f'{HOME}/world.json'
    with open(path) as file:
        world = json.load(file)
    try:
        return act(world, arguments)
    finally:
        with open(path, 'w') as file:
            json.dump(world, file)


def act(world: dict, arguments: list[str]) -> int:
    if world.get('logged_out'):
        fail('You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login\n')
    assert arguments[:2] == ['compute', 'tpus'], arguments
    group, verb, *rest = arguments[2:]
    options = parser(group, verb).parse_args(rest)
    match verb:
        case 'create':
            return create(world, group)
        case 'describe':
            return describe(world, group)
        case 'delete':
            return delete(world, group)
        case 'scp':
            usable(world)
            assert all(os.path.isfile(name) for name in options.name[:-1]), options.name
            return 0
        case _:
            usable(world)
            script, command = options.command.split()[1:3]
            assert script == 'on_worker.sh'
            then = world[f'{command}s'].pop(0) if world.get(f'{command}s') else {'status': 0}
            print(f'worker says: {command}')
            statuses = then.pop('statuses', [])
            for worker, status in enumerate(statuses):
                print(
                    f'##### Command execution on worker {worker} failed with exit status {status}. Continuing.',
                    file=sys.stderr,
                )
            status = then.pop('status', statuses[0] if statuses else 0)
            world.update(then)
            return status


def parser(group: str, verb: str) -> argparse.ArgumentParser:
    """Builds a parser for the flags that launch/ uses; it rejects all others."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('name', nargs='+' if verb == 'scp' else None)
    parser.add_argument('--zone', required=True)
    parser.add_argument('--project')
    match group, verb:
        case _, 'create':
            parser.add_argument('--accelerator-type', required=True)
            parser.add_argument('--spot', action='store_true')
            parser.add_argument('--network')
            parser.add_argument('--version' if group == 'tpu-vm' else '--runtime-version', required=True)
            if group == 'queued-resources':
                parser.add_argument('--node-id', required=True)
        case _, 'describe':
            form = 'value(state)' if group == 'tpu-vm' else 'value(state.state)'
            parser.add_argument('--format', required=True, choices=[form])
        case _, 'delete':
            parser.add_argument('--quiet', action='store_true', required=True)
            if group == 'queued-resources':
                parser.add_argument('--force', action='store_true', required=True)
        case 'tpu-vm', 'scp' | 'ssh':
            parser.add_argument('--worker', choices=['all', '0'], required=True)
            parser.add_argument('--quiet', action='store_true', required=True)
            if verb == 'ssh':
                parser.add_argument('--ssh-flag', action='append')
                parser.add_argument('--command', required=True)
    return parser


def create(world: dict, group: str) -> int:
    if world.get('create_errors'):
        fail(world['create_errors'].pop(0))
    if group == 'queued-resources':
        if 'request' in world:
            fail('ALREADY_EXISTS: Resource already exists')
        world['request'] = 'ACCEPTED'
        world['waiting'] = list(world.get('queue', ['ACTIVE']))
    else:
        if 'node' in world:
            fail('ALREADY_EXISTS: Resource already exists')
        world['node'] = 'READY'
    return 0


def describe(world: dict, group: str) -> int:
    if world.get('describe_works', 0):
        world['describe_works'] -= 1
    elif world.get('describe_fails', 0):
        world['describe_fails'] -= 1
        fail('There was a problem refreshing your current auth tokens: no network')
    if group == 'queued-resources' and world.get('waiting'):
        world['request'] = world['waiting'].pop(0)
        if world['request'] == 'ACTIVE':
            world['node'] = 'READY'
    state = world.get('request' if group == 'queued-resources' else 'node')
    if state is None:
        fail("NOT_FOUND: Resource 'projects/mine/locations/us-west4-a/nodes/pod' was not found")
    print(state)
    return 0


def delete(world: dict, group: str) -> int:
    if group == 'queued-resources':
        del world['request']
        world.pop('node', None)
    else:
        assert 'request' not in world, 'the TPU VM belongs to a queued resource'
        del world['node']
    return 0


def usable(world: dict) -> None:
    if 'node' not in world:
        fail('NOT_FOUND: the node was not found')
    if world['node'] in UNUSABLE:
        fail(f'This TPU has terminal state "{world["node"]}", so it cannot be used anymore.')


def fail(text: str) -> NoReturn:
    print(f'ERROR: (gcloud.compute.tpus) {text}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

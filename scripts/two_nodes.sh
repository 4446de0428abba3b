#!/usr/bin/env bash
# Run a training on two "nodes" of one machine, each a network namespace of its own, as torchrun does on a cluster (root, iproute2):
#   scripts/two_nodes.sh -m stts_lightning.train trainer=ddp trainer.accelerator=cpu trainer.precision=32-true trainer.num_nodes=2 trainer.devices=1 ...
# PYTHON names the interpreter. Both nodes see the same files, as on a shared file system.
set -euo pipefail
python=${PYTHON:-python3}
tag=$$
clean() {
  ip netns del "a$tag" 2>/dev/null || true
  ip netns del "b$tag" 2>/dev/null || true
}
trap clean EXIT
ip netns add "a$tag"
ip netns add "b$tag"
ip link add "va$tag" type veth peer name "vb$tag"
rank=0
for node in a b; do
  ip link set "v$node$tag" netns "$node$tag"
  ip -n "$node$tag" addr add "10.77.0.$((rank + 1))/24" dev "v$node$tag"
  ip -n "$node$tag" link set "v$node$tag" up
  ip -n "$node$tag" link set lo up
  rank=$((rank + 1))
done
run() { # node, its rank
  GLOO_SOCKET_IFNAME=v$1$tag ip netns exec "$1$tag" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \
    --node-rank="$2" --master-addr=10.77.0.1 --master-port=29511 "${@:3}"
}
run b 1 "$@" &
other=$!
run a 0 "$@"
wait "$other"

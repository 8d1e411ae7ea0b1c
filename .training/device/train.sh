export PYTHONPATH=/tmp/site OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
[ -d .device/pack2 ] && cp -r .device/pack2 /tmp/; python3 .device/unpack.py || exit 1
export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mpslog; mkdir -p /tmp/mps /tmp/mpslog; pgrep nvidia-cuda-mps || nvidia-cuda-mps-control -d
timeout $6 python3 .device/four.py /tmp/bank /tmp/four $1 $2 $3 $4 > $OUT/driver.log 2>&1
tail -n 3 $OUT/driver.log
cd /tmp/four
for n in whole nomarkers nodeepstack neither; do cp $n/model.safetensors $OUT/$n.safetensors; tail -n 2 $n.log; done
cp whole/training/state.safetensors $OUT/whole.state.safetensors
tar czf $OUT/logs.tgz *.log

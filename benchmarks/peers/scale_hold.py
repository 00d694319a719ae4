"""What a model of a real shape with random weights in f32 and its adapters take in PEFT: memory, switches, tokens. One thread.
usage: scale_hold.py SIZE FOLDER ROUNDS    (SIZE: as scale_model.py has it; FOLDER: of PEFT adapters)
Prints JSON: bytes resident above the plain model after all are loaded and used, CPU milliseconds of a switch, a token ÷ plain."""
import json, pathlib, statistics, sys, time, torch, peft
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "lib"))
import scale_model
torch.set_num_threads(1)
m = scale_model.random_model(sys.argv[1]).eval()


def clocked(work):
    begun = time.process_time()
    result = work()
    return 1e3 * (time.process_time() - begun), result


def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024


@torch.inference_mode()
def token():
    past = m(input_ids=torch.arange(500, 532)[None], use_cache=True).past_key_values
    return clocked(lambda: m(input_ids=torch.tensor([[700]]), past_key_values=past, use_cache=True))[0]


rounds = int(sys.argv[3])
token()
plain, plain_bytes = statistics.median(token() for _ in range(rounds)), resident()
folders = sorted(pathlib.Path(sys.argv[2]).iterdir())
m = peft.PeftModel.from_pretrained(m, folders[0], adapter_name=folders[0].name)
for folder in folders[1:]:
    m.load_adapter(folder, adapter_name=folder.name)
switches, tokens = [], []
# Each was used before, as in our own "again".
for folder in folders:
    m.set_adapter(folder.name)
for i in range(max(rounds, len(folders))):
    switches.append(clocked(lambda: m.set_adapter(folders[i % len(folders)].name))[0])
    if i < rounds:
        tokens.append(token())
print(json.dumps({"version": f"peft {peft.__version__}, torch {torch.__version__}", "resident": resident() - plain_bytes,
                  "switch": statistics.median(switches), "plain": plain, "token": statistics.median(tokens) / plain}))

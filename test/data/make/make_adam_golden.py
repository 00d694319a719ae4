"""Steps of torch.optim.Adam in f64: two groups, warm-up, decay and clipping by the norm of all.
usage: make_adam_golden.py OUT.json"""
import json, math, sys, torch

def case(decay, steps, warmup, clip):
    generator = torch.Generator().manual_seed(steps + warmup)
    groups = [torch.randn(n, generator=generator).double().requires_grad_() for n in (7, 4)]
    start = [p.tolist() for p in groups]
    rates = (0.02, 0.003)
    optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(groups, rates)])

    def schedule(done):
        if done < warmup: return (done + 1) / warmup
        if decay == "none": return 1.0
        gone = min(1.0, (done - warmup) / (steps - warmup))
        return 1 - gone

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    gradients, values, norms = [], [], []
    for i in range(steps):
        these = [torch.randn(p.shape, generator=generator).mul(3.0 if i % 3 == 0 else 0.1) for p in groups]
        gradients.append([g.tolist() for g in these])
        for p, g in zip(groups, these): p.grad = g.double()
        norms.append(float(torch.nn.utils.clip_grad_norm_(groups, clip if clip else math.inf)))
        optimizer.step()
        scheduler.step()
        values.append([p.tolist() for p in groups])
    return {"decay": decay, "steps": steps, "warmup": warmup, "clip": clip, "rates": rates,
            "start": start, "gradients": gradients, "norms": norms, "values": values}

cases = [case("linear", 12, 3, 1.0), case("linear", 10, 0, None), case("none", 6, 2, 0.5)]
rounded = json.loads(json.dumps(cases), parse_float=lambda x: float(f"{float(x):.9g}"))
open(sys.argv[1], "w").write(json.dumps(rounded) + "\n")

import { buildAuto } from "./dist/src/pack/auto.js";
import { Suite, bytesOfAdapter } from "./benchmarks/size/suite.js";
const suite = await Suite.open("own-seed");
for (const [n, ratio] of [[5, 8],[5,30]]) {
 const a = suite.take(n); const max = Math.floor(a.map(bytesOfAdapter).reduce((x,y)=>x+y)/ratio);
 let t = performance.now(), c = process.cpuUsage().user;
 try { const { report } = await buildAuto(a, { criterion: { kind: "bytes", max }, onProgress: (d, of, x) => { console.log(d, of, x.name, x.bytes, x.error, x.reason, ((performance.now()-t)/1000).toFixed(1)); } });
 console.log(n, ratio, report.bytes, report.error.mean, report.mode, report.gauge, JSON.stringify(report.types), (performance.now()-t)/1000, (process.cpuUsage().user-c)/1e6); } catch (e) { console.log(e.message); }
}

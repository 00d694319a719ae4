/** Runs in a fresh process: calls a function of a module and prints its result as JSON. node call.js MODULE NAME [ARGUMENT,…] */
const [, , module = "", name = "", args = "[]"] = process.argv;
console.log(JSON.stringify(await (await import(module))[name](...JSON.parse(args))));
// Exits at once, since threads of a runtime would keep the process alive.
process.exit();

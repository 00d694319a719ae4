/**
 * Events of what switches tasks: runtimes, sessions, pipelines.
 */
import { Observable } from "../events.ts";
import type { Selection, SwitchReport } from "./selection.ts";

/** Events of what switches tasks. */
export interface SwitchEvents<Report extends SwitchReport = SwitchReport> {
  /** A switch begins: those asked for before are done. */
  readonly switchstart: { readonly task: Selection };
  /** A switch has ended. `task` is what was asked for; `error` says why that is not active. */
  readonly switchend: { readonly task: Selection; readonly report?: Report; readonly error?: unknown };
  /** The device that the model runs on is gone. */
  readonly devicelost: { readonly message: string };
}

/** Base of what switches tasks. */
export class Switching<Report extends SwitchReport = SwitchReport> extends Observable<SwitchEvents<Report>> {
  /** @internal Tells of a switch while it is made. */
  async switching(task: Selection, make: () => Promise<Report>): Promise<Report> {
    this.tell("switchstart", { task });
    try {
      const report = await make();
      this.tell("switchend", { task, report });
      return report;
    } catch (error) {
      this.tell("switchend", { task, error });
      throw error;
    }
  }
}

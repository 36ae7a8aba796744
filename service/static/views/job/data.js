/** What the view of a job reads: the job and its figures, kept up to date by its events, and its reconstructions. */
import { useEffect, useRef, useState } from "preact/hooks";
import { get } from "../../api.js";
import { coalesced, follow } from "../../events.js";

const POINTS = 1500;

/** The job that an id or a name stands for: `{job, metrics, events, error, reload}`, null and empty until they are read. */
export function useJob(reference) {
  const [state, setState] = useState({ job: null, metrics: null, events: [], error: null });
  const reload = useRef(() => {});
  useEffect(() => {
    const aborter = new AbortController();
    const { signal } = aborter;
    let stop = () => {};
    const change = (changes) => {
      if (!signal.aborted) setState((before) => ({ ...before, ...changes(before) }));
    };
    const keep = (kind) => (data) => change(({ events }) => ({ events: [...events, { kind, data }] }));

    const readJob = async () => {
      const job = await get(`/jobs/${encodeURIComponent(reference)}`, {}, { signal });
      change(() => ({ job, error: null }));
      return job;
    };
    const readMetrics = async (id) => {
      const metrics = await get(`/jobs/${id}/metrics`, { points: POINTS, tokens: "false" }, { signal });
      change(() => ({ metrics }));
    };
    // What cannot be read is read at the next event, and after the connection was made again.
    const readAll = () => readJob().then((job) => readMetrics(job.id)).catch(() => {});
    const refresh = coalesced(readAll, 50);
    // While steps come, a service that is slow is left three times as long as it took.
    const refreshCurve = coalesced(readAll, 1000, (took) => Math.min(3 * took, 10_000));
    reload.current = readAll;

    const handlers = {
      status: (data) => {
        keep("status")(data);
        refresh();
      },
      checkpoint: (data) => {
        keep("checkpoint")(data);
        refresh();
      },
      warning: (data) => {
        keep("warning")(data);
        refresh();
      },
      step: (progress) => {
        change(({ job }) => ({ job: { ...job, progress } }));
        refreshCurve();
      },
    };
    const start = async () => {
      try {
        const job = await readJob();
        if (signal.aborted) return;
        stop = follow(`/jobs/${job.id}/events`, handlers, { onReconnect: refresh, onEnd: refresh });
        refresh();
      } catch (error) {
        change(() => ({ error }));
        const willPass = error.code === "unreachable" || error.status === 503;
        if (willPass && !signal.aborted) setTimeout(start, 1000);
      }
    };
    start();
    return () => {
      aborter.abort();
      refresh.cancel();
      refreshCurve.cancel();
      stop();
    };
  }, [reference]);
  return { ...state, reload: () => reload.current() };
}

/** The tokens of each recorded quarter's reconstruction: percent -> tokens. Each is read once, the newest first. */
export function useTokens(id, checkpoints = []) {
  const [tokens, setTokens] = useState({});
  const asked = useRef(new Set());
  const percents = checkpoints.map((one) => one.percent).join();
  useEffect(() => {
    for (const { percent, reconstruction } of [...checkpoints].reverse()) {
      if (!reconstruction || asked.current.has(percent)) continue;
      asked.current.add(percent);
      get(`/jobs/${id}/checkpoints/${percent}/reconstruction`, { count: 2048 }).then(
        (page) => setTokens((before) => ({ ...before, [percent]: page.data })),
        () => asked.current.delete(percent),
      );
    }
  }, [id, percents]);
  return tokens;
}

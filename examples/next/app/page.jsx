"use client";

import { useEffect, useState } from "react";
import { classify, loadModel } from "./model.js";

export default function Page() {
  const [tasks, setTasks] = useState([]);
  const [task, setTask] = useState("");
  const [text, setText] = useState("a fast mail reader for the terminal");
  const [answer, setAnswer] = useState("Loading …");

  useEffect(() => {
    const onProgress = ({ status, file, progress }) => {
      if (status === "progress") setAnswer(`Loading ${file}: ${Math.round(progress)} %`);
    };
    loadModel(onProgress).then(
      ({ pack }) => {
        setTasks([...pack.tasks.keys()]);
        setTask([...pack.tasks.keys()][0]);
      },
      (error) => setAnswer(error.message),
    );
  }, []);

  useEffect(() => {
    let current = true;
    const show = (value) => current && setAnswer(value);
    if (task) classify(task, text).then(show, (error) => show(error.message));
    return () => {
      current = false;
    };
  }, [task, text]);

  return (
    <main>
      <input aria-label="Sentence" size={60} value={text} onChange={({ target }) => setText(target.value)} />
      <select aria-label="Task" value={task} onChange={({ target }) => setTask(target.value)}>
        {tasks.map((id) => (
          <option key={id}>{id}</option>
        ))}
      </select>
      <output>{answer}</output>
    </main>
  );
}

// One layer of text, a button for each task: the smallest app that switches.

import { toBase64 } from "eigenlora/react-native";
import { Asset } from "expo-asset";
import * as FileSystem from "expo-file-system/legacy";
import * as ort from "onnxruntime-react-native";
import { createElement, useEffect, useState } from "react";
import { Button, Text, View } from "react-native";
import { openModel, openTasks } from "./tasks.js";

const path = (/** @type {string} */ uri) => uri.replace(/^file:\/\//, "");
const base64 = FileSystem.EncodingType.Base64;

/** @type {import("./tasks.js").Files} */
const files = {
  size: async (uri) => (await FileSystem.getInfoAsync(uri)).size,
  read: (uri, position, length) => FileSystem.readAsStringAsync(uri, { encoding: base64, position, length }),
  async write(name, bytes) {
    const uri = FileSystem.cacheDirectory + name;
    await FileSystem.writeAsStringAsync(uri, toBase64(bytes), { encoding: base64 });
    return path(uri);
  },
  remove: (name) => FileSystem.deleteAsync(`file://${name}`),
};

/** The file of an asset; "eigen" and "onnx" are asset extensions in metro.config.js. */
async function onDevice(/** @type {number} */ asset) {
  const { localUri } = await Asset.fromModule(asset).downloadAsync();
  return /** @type {string} */ (localUri);
}

export default function App() {
  const [tasks, setTasks] = useState(/** @type {string[]} */ ([]));
  const [session, setSession] = useState(/** @type {Awaited<ReturnType<typeof openModel>> | undefined} */ (undefined));
  const [said, say] = useState("Loading");
  useEffect(() => {
    (async () => {
      const pack = await openTasks(files, await onDevice(require("./assets/tasks.eigen")));
      setTasks([...pack.tasks.keys()]);
      setSession(await openModel(ort, files, await onDevice(require("./assets/model.onnx")), pack));
      say("Choose a task");
    })().catch((error) => say(error.message));
  }, []);
  const choose = (/** @type {string} */ task) => async () => {
    const { milliseconds } = await /** @type {NonNullable<typeof session>} */ (session).switchTask(task);
    say(`${task}, in ${milliseconds.total.toFixed(1)} ms`);
  };
  return createElement(
    View,
    null,
    createElement(Text, null, said),
    session && tasks.map((task) => createElement(Button, { key: task, title: task, onPress: choose(task) })),
  );
}

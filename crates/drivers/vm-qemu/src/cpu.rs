//! The CPU models that this host's QEMU has, and what each gives to a guest: asked of QEMU itself, without a machine.

use crate::probe::accelerator;
use karst_host::Program;
use karst_model::{Error, Result};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{Read, Seek},
    path::PathBuf,
    time::{Duration, SystemTime},
};
use tokio::sync::Mutex;

/// A model of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    /// Name, such as `EPYC-Rome`; without those of a version (`EPYC-Rome-v2`).
    pub name: String,
    /// What its guests read as vendor, such as `AuthenticAMD`.
    pub vendor: String,
    /// What it switches on, in QEMU's words, aliases included.
    pub features: Vec<String>,
    /// Of these, what this host's accelerator cannot give.
    pub missing: Vec<String>,
}

/// QEMU on a slow host answers for all models within a second or two.
const PATIENCE: Duration = Duration::from_secs(25);
/// About 12 KiB each.
const OUTPUT: u64 = 8 << 20;
/// Most models that are asked for; QEMU 10 has 64.
const MOST: usize = 256;

type Cached = Option<((PathBuf, SystemTime, &'static str), Vec<CpuModel>)>;
/// Held while QEMU is asked: several who want to know wait for one answer.
static CACHE: Mutex<Cached> = Mutex::const_new(None);

fn odd(what: &str, context: impl std::fmt::Display) -> Error {
    Error::internal(format!("QEMU does not tell {what}"), context)
}

/// Gives QEMU `commands`, all at once; answers what they returned, in order. It writes into memory: when it ends, QEMU drops
/// what a full pipe has not taken yet, which is much of it where the reader stands still for a moment.
async fn ask(accelerator: &str, commands: &[Value]) -> Result<Vec<Value>> {
    let mut input = String::new();
    let first = json!({"execute": "qmp_capabilities"});
    let last = json!({"execute": "quit"});
    for command in std::iter::once(&first).chain(commands).chain([&last]) {
        input += &format!("{command}\n");
    }
    let arguments = ["-S", "-no-user-config", "-nodefaults", "-display", "none", "-M", "none", "-accel"];
    let run =
        karst_host::run(Program::QemuSystemX86).args(arguments).arg(accelerator).args(["-qmp", "stdio"]);
    let said = rustix::fs::memfd_create("cpu-models", rustix::fs::MemfdFlags::CLOEXEC);
    let mut said = File::from(said.map_err(std::io::Error::from)?);
    run.stdin(input).timeout(PATIENCE).stdout_fd(said.try_clone()?.into()).ok().await?;
    let mut output = vec![];
    said.rewind()?;
    said.take(OUTPUT).read_to_end(&mut output)?;
    answers(&String::from_utf8_lossy(&output), commands.len())
}

/// What `count` commands returned: the first answer is that of the greeting's.
fn answers(output: &str, count: usize) -> Result<Vec<Value>> {
    let mut returned = vec![];
    for line in output.lines() {
        let mut line: Value = serde_json::from_str(line).map_err(|e| odd("its CPU models", e))?;
        if let Some(error) = line.get("error") {
            return Err(odd("its CPU models", error));
        }
        if let Some(value) = line.get_mut("return") {
            returned.push(value.take());
        }
    }
    if returned.len() <= count {
        return Err(odd("all of its CPU models", returned.len()));
    }
    Ok(returned.drain(1..=count).collect())
}

fn words(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

/// Is it a name with a version, such as `EPYC-v2`?
fn versioned(name: &str) -> bool {
    name.rsplit_once("-v").is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Name of a model, and what the accelerator lacks of it.
fn definitions(listed: &Value) -> Vec<(String, Vec<String>)> {
    let name = |d: &Value| d.get("name")?.as_str().filter(|n| !versioned(n)).map(str::to_owned);
    let missing = |d: &Value| words(d.get("unavailable-features").unwrap_or(&Value::Null));
    let all = listed.as_array().into_iter().flatten();
    all.filter_map(|d| Some((name(d)?, missing(d)))).take(MOST).collect()
}

/// A model out of its definition and what QEMU expands it to.
fn model((name, missing): (String, Vec<String>), expanded: &Value) -> Option<CpuModel> {
    let properties = expanded.get("model")?.get("props")?.as_object()?;
    // Switches of QEMU's own that are none of a processor.
    let own = |name: &str| ["x-", "hv-", "kvm", "xen-"].iter().any(|p| name.starts_with(p));
    let on = properties.iter().filter(|(n, v)| **v == Value::Bool(true) && !own(n));
    let vendor = properties.get("vendor").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(CpuModel { name, vendor, features: on.map(|(n, _)| n.clone()).collect(), missing })
}

/// All models, in QEMU's order; kept until its program or the accelerator changes.
///
/// # Errors
/// Unsupported when QEMU is not installed, naming the package; internal when it does not answer.
pub async fn models() -> Result<Vec<CpuModel>> {
    let path = Program::QemuSystemX86.path()?;
    let modified = std::fs::metadata(&path)?.modified()?;
    let accelerator = accelerator().kind.as_str();
    let key = (path, modified, accelerator);
    let mut cache = CACHE.lock().await;
    if let Some((_, models)) = cache.as_ref().filter(|(k, _)| *k == key) {
        return Ok(models.clone());
    }
    let listed = ask(accelerator, &[json!({"execute": "query-cpu-definitions"})]).await?;
    let mut found = definitions(listed.first().unwrap_or(&Value::Null));
    // It exists by hardware virtualization only, and cannot be asked after without.
    found.retain(|(name, _)| name != "host" || accelerator == "kvm");
    let expand = |name: &String| {
        json!({
            "execute": "query-cpu-model-expansion",
            "arguments": {"type": "full", "model": {"name": name}},
        })
    };
    let commands: Vec<Value> = found.iter().map(|(name, _)| expand(name)).collect();
    let expanded = ask(accelerator, &commands).await?;
    let models: Vec<CpuModel> =
        found.into_iter().zip(&expanded).filter_map(|(defined, e)| model(defined, e)).collect();
    *cache = Some((key, models.clone()));
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says_is_read() {
        let said = concat!(
            "{\"QMP\": {\"version\": {}}}\n{\"return\": {}}\n",
            "{\"return\": [{\"name\": \"EPYC-v1\"}, {\"name\": \"EPYC\", \"unavailable-features\": [\"npt\"]}]}\n",
            "{\"timestamp\": {}, \"event\": \"SHUTDOWN\"}\n{\"return\": {}}\n",
        );
        let listed = answers(said, 1).unwrap();
        let found = definitions(&listed[0]);
        assert_eq!(found, [("EPYC".to_owned(), vec!["npt".to_owned()])]);
        let props = json!({"aes": true, "npt": true, "avx": false, "x-own": true, "vendor": "AuthenticAMD"});
        let model = model(found[0].clone(), &json!({"model": {"name": "EPYC", "props": props}})).unwrap();
        assert_eq!(
            (model.features, model.vendor.as_str()),
            (vec!["aes".into(), "npt".into()], "AuthenticAMD")
        );
        assert!(answers("{\"return\": {}}\n", 1).is_err(), "it ended before it answered");
        assert!(answers("{\"return\": {}}\n{\"error\": {\"desc\": \"no\"}}\n", 1).is_err());
        assert!(versioned("Skylake-Client-v4") && !versioned("Opteron_G1") && !versioned("x-v"));
    }

    #[tokio::test]
    async fn this_hosts_qemu() {
        if Program::QemuSystemX86.path().is_err() {
            return crate::backends::missing("QEMU is not installed");
        }
        let all = models().await.unwrap();
        let nehalem = all.iter().find(|m| m.name == "Nehalem").unwrap();
        assert_eq!(nehalem.vendor, "GenuineIntel");
        let has = |name: &str| nehalem.features.iter().any(|f| f == name);
        assert!(has("sse4.2") && !has("avx2") && all.iter().any(|m| m.name == "max"));
        assert_eq!(models().await.unwrap(), all, "the kept answer is the same");
    }
}

//! `info`: one instance for people, or the server.

use std::fmt::Write as _;

use serde_json::Value;

use super::completion::complete;
use crate::{
    client::{About, Instance, Kind, Url, decode, types::State},
    context::Context,
    error::{Error, Result},
    output::{self, to_yaml, units},
};

/// Options of `info`.
#[derive(Debug, clap::Args)]
pub struct Info {
    /// Instance; the server if none
    #[arg(add = complete(Kind::Instance))]
    instance: Option<String>,
    /// Also the log of its console
    #[arg(long, requires = "instance")]
    show_log: bool,
    /// The hardware of the host
    #[arg(long, conflicts_with = "instance")]
    resources: bool,
    /// Format: text (instances), json or yaml
    #[arg(short, long, value_enum)]
    format: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
    Yaml,
}

impl Info {
    /// Prints it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let Some(name) = &self.instance else {
            let url = if self.resources { Url::new(&["resources"]) } else { Url::new(&[]) };
            let object = context.client.get(&url).await?.metadata;
            return print(&object, self.format.unwrap_or(Format::Yaml));
        };
        let url = Url::new(&["instances", name]).with("recursion", 1);
        let object = context.client.get(&url).await.about(&context.client, Kind::Instance, name)?.metadata;
        match self.format {
            None | Some(Format::Text) => {
                let mut instance: Instance = decode(object)?;
                instance.vmid = vmid(context, name).await;
                output::print(&text(&instance))?;
                output::print(&pending(context, name).await?)?;
            }
            Some(format) => print(&object, format)?,
        }
        if self.show_log {
            output::print("\nLog:\n\n")?;
            super::console::show_log(context, name).await?;
        }
        Ok(())
    }
}

/// A change that waits for the next start.
#[derive(serde::Deserialize)]
struct Pending {
    key: String,
    live: Option<String>,
    configured: Option<String>,
}

/// Its VMID; none where the server is Incus' own, which has no such numbers.
async fn vmid(context: &Context, name: &str) -> Option<u64> {
    let answer = context.client.get(&Url::new(&["karst", "instances", name])).await.ok()?;
    answer.metadata["vmid"].as_u64()
}

/// What of the instance waits for its next start; nothing where the server is Incus' own, which does not tell.
async fn pending(context: &Context, name: &str) -> Result<String> {
    let answer = context.client.get(&Url::new(&["karst", "instances", name, "pending"])).await;
    let Ok(answer) = answer else { return Ok(String::new()) };
    Ok(changes(&decode::<Vec<Pending>>(answer.metadata)?))
}

/// Says which of these keys wait for the instance's next start: what was set is so for the record only, then.
pub(super) async fn tell_waiting(context: &Context, name: &str, keys: &[String]) {
    let Ok(answer) = context.client.get(&Url::new(&["karst", "instances", name, "pending"])).await else {
        return;
    };
    let Ok(pending) = decode::<Vec<Pending>>(answer.metadata) else { return };
    for change in pending.iter().filter(|p| keys.contains(&p.key)) {
        crate::error::report_line(&waiting(name, change));
    }
}

fn waiting(name: &str, change: &Pending) -> String {
    let now = change.live.as_deref().filter(|v| !v.contains('\n'));
    let now = now.map(|v| format!("; it runs with {v}")).unwrap_or_default();
    format!("{} takes effect with the next start of {name}{now}", change.key)
}

fn changes(pending: &[Pending]) -> String {
    let mut out = Text::default();
    if !pending.is_empty() {
        out.0.push('\n');
        out.heading(0, "Pending (takes effect with the next start)");
    }
    let value = |v: &Option<String>| match v.as_deref() {
        None => "-".to_owned(),
        // Several lines, such as cloud-init's, would hide the rest.
        Some(text) if text.contains('\n') => format!("({} lines)", text.lines().count()),
        Some(text) => text.to_owned(),
    };
    for change in pending {
        out.field(2, &change.key, format!("{} -> {}", value(&change.live), value(&change.configured)));
    }
    out.0
}

fn print(object: &Value, format: Format) -> Result<()> {
    match format {
        Format::Json => output::line(&serde_json::to_string(object).map_err(Error::local)?),
        Format::Text | Format::Yaml => output::print(&to_yaml(object)?),
    }
}

/// Lines of `name: value`, indented; empty values say nothing and are left out.
#[derive(Default)]
struct Text(String);

impl Text {
    fn field(&mut self, indent: usize, name: &str, value: impl AsRef<str>) {
        let value = value.as_ref();
        if !value.is_empty() {
            let _ = writeln!(self.0, "{:indent$}{name}: {value}", "");
        }
    }

    fn heading(&mut self, indent: usize, name: &str) {
        let _ = writeln!(self.0, "{:indent$}{name}:", "");
    }
}

/// What Incus prints, without the lines that say nothing.
fn text(instance: &Instance) -> String {
    let mut out = Text::default();
    let kind =
        if instance.ephemeral { format!("{} (ephemeral)", instance.kind) } else { instance.kind.clone() };
    out.field(0, "Name", &instance.name);
    out.field(0, "Description", &instance.description);
    out.field(0, "Status", instance.status.to_uppercase());
    out.field(0, "Reason", instance.state.as_ref().map_or("", |s| s.karst_reason.as_str()));
    out.field(0, "Type", kind);
    out.field(0, "VMID", instance.vmid.map(|n| n.to_string()).unwrap_or_default());
    out.field(0, "Architecture", &instance.architecture);
    if instance.location != "none" {
        out.field(0, "Location", &instance.location);
    }
    let state = instance.state.clone().unwrap_or_default();
    if state.pid > 0 {
        out.field(0, "PID", state.pid.to_string());
    }
    out.field(0, "Created", units::time(&instance.created_at));
    out.field(0, "Last Used", units::time(&instance.last_used_at));
    out.field(0, "Started", units::time(&state.started_at));
    if state.pid > 0 {
        out.0.push('\n');
        out.heading(0, "Resources");
        resources(&mut out, &state);
    }
    if !instance.snapshots.is_empty() {
        out.0.push('\n');
        out.heading(0, "Snapshots");
        for snapshot in &instance.snapshots {
            let stateful = if snapshot.stateful { " (stateful)" } else { "" };
            out.field(2, &snapshot.name, format!("{}{stateful}", units::time(&snapshot.created_at)));
        }
    }
    out.0
}

/// What a running instance uses.
fn resources(out: &mut Text, state: &State) {
    if state.processes > 0 {
        out.field(2, "Processes", state.processes.to_string());
    }
    let disks: Vec<_> = state.disk.iter().filter(|(_, disk)| disk.usage > 0).collect();
    if !disks.is_empty() {
        out.heading(2, "Disk usage");
        for (name, disk) in disks {
            out.field(4, name, units::known_bytes(disk.usage));
        }
    }
    if state.cpu.usage > 0 {
        out.heading(2, "CPU usage");
        out.field(4, "CPU usage (in seconds)", format!("{:.2}", state.cpu.usage as f64 / 1e9));
    }
    if state.memory.usage > 0 {
        out.heading(2, "Memory usage");
        out.field(4, "Memory (current)", units::known_bytes(state.memory.usage));
        out.field(4, "Memory (peak)", units::known_bytes(state.memory.usage_peak));
        out.field(4, "Memory (limit)", units::known_bytes(state.memory.total));
        out.field(4, "Swap (current)", units::known_bytes(state.memory.swap_usage));
    }
    if !state.network.is_empty() {
        out.heading(2, "Network usage");
    }
    for (name, nic) in &state.network {
        let bytes = |value: i64| units::bytes(value.max(0).unsigned_abs());
        out.heading(4, name);
        out.field(6, "Type", &nic.kind);
        out.field(6, "State", nic.state.to_uppercase());
        out.field(6, "Host interface", &nic.host_name);
        out.field(6, "MAC address", &nic.hwaddr);
        out.field(6, "MTU", if nic.mtu > 0 { nic.mtu.to_string() } else { String::new() });
        out.field(6, "Bytes received", bytes(nic.counters.bytes_received));
        out.field(6, "Bytes sent", bytes(nic.counters.bytes_sent));
        out.field(6, "Packets received", nic.counters.packets_received.to_string());
        out.field(6, "Packets sent", nic.counters.packets_sent.to_string());
        if !nic.addresses.is_empty() {
            out.heading(6, "IP addresses");
        }
        for address in &nic.addresses {
            out.field(
                8,
                &address.family,
                format!("{}/{} ({})", address.address, address.netmask, address.scope),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn changes_that_wait() {
        let pending = json!([
            {"key": "limits.memory", "live": "1GiB", "configured": "2GiB"},
            {"key": "cloud-init.user-data", "live": null, "configured": "#cloud-config\nx: 1\n"},
            {"key": "devices.eth1", "live": "type=nic", "configured": null}]);
        let pending: Vec<Pending> = serde_json::from_value(pending).unwrap();
        assert_eq!(
            changes(&pending),
            "\nPending (takes effect with the next start):\n  limits.memory: 1GiB -> 2GiB\n  \
             cloud-init.user-data: - -> (2 lines)\n  devices.eth1: type=nic -> -\n"
        );
        assert_eq!(changes(&[]), "");
        assert_eq!(
            waiting("v1", &pending[0]),
            "limits.memory takes effect with the next start of v1; it runs with 1GiB"
        );
        assert_eq!(waiting("v1", &pending[1]), "cloud-init.user-data takes effect with the next start of v1");
    }

    #[test]
    fn running_and_stopped() {
        let running = json!({"name": "c1", "status": "Running", "type": "container", "ephemeral": true, "location": "none", "vmid": 104,
            "architecture": "x86_64", "created_at": "0001-01-01T00:00:00Z",
            "snapshots": [{"name": "before", "stateful": true, "created_at": ""}],
            "state": {"pid": 42, "processes": 7, "cpu": {"usage": 1_500_000_000}, "memory": {"usage": 52_428_800, "total": 0},
                "disk": {"root": {"usage": 1_048_576}},
                "network": {"eth0": {"type": "broadcast", "state": "up", "hwaddr": "00:16:3e:00:00:01", "mtu": 1500,
                    "counters": {"bytes_received": 2048},
                    "addresses": [{"family": "inet", "address": "10.0.0.2", "netmask": "24", "scope": "global"}]}}}});
        insta::assert_snapshot!("running", text(&serde_json::from_value(running).unwrap()));
        let stopped = json!({"name": "v1", "status": "Stopped", "type": "virtual-machine", "snapshots": null, "state": null});
        insta::assert_snapshot!("stopped", text(&serde_json::from_value(stopped).unwrap()));
    }
}

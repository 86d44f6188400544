//! Commands of the QEMU guest agent's protocol, whichever agent the guest has: QEMU's own gets them as they are, Karst's
//! answers those that it has a request for.

use super::{FIGURES, Inside, Ports, interfaces};
use crate::line::printable;
use karst_guest_agent::message::{self, Info, Nothing, Request};
use karst_model::{Error, Result};
use serde_json::{Value, json};
use std::time::Duration;

/// Commands that have no answer when they succeed.
const SILENT: &[&str] =
    &["guest-shutdown", "guest-suspend-disk", "guest-suspend-ram", "guest-suspend-hybrid"];
/// How long their failure is waited for.
const FAILURE: Duration = Duration::from_secs(2);
/// What Karst's own agent answers.
const OWN: &[&str] = &[
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-get-osinfo",
    "guest-get-host-name",
    "guest-network-get-interfaces",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-thaw",
    "guest-set-time",
    "guest-shutdown",
];

impl Inside {
    /// Runs a command, and answers what it returns.
    ///
    /// # Errors
    /// Unavailable without an agent; unsupported when the one that is there does not have the command or forbids it;
    /// what the guest refuses.
    pub(crate) async fn command(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        let ports = *self.ports.borrow();
        // QEMU's first, where both are: it has all of them.
        match ports {
            Ports { qemu: Some(true), .. } | Ports { qemu: None, karst: Some(false) | None } => {
                self.of_qemu(command, arguments, limit).await
            }
            Ports { karst: Some(true), .. } | Ports { karst: None, qemu: Some(false) } => {
                self.of_karst(command, &arguments, limit).await
            }
            _ => Err(self.qemu.silent()),
        }
    }

    async fn of_qemu(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        if !SILENT.contains(&command) {
            return self.qemu.call(command, arguments, limit).await;
        }
        self.qemu.ping(limit).await?;
        match self.qemu.call(command, arguments, FAILURE).await {
            // As it should be.
            Err(e) if e.is(karst_model::ErrorKind::Unavailable) => Ok(json!({})),
            other => other,
        }
    }

    async fn of_karst(&self, command: &str, arguments: &Value, limit: Duration) -> Result<Value> {
        let link = &self.link;
        let info = || link.call::<Info>(Request::Info(Nothing {}), limit);
        let text = |s: &str| printable(s, 128);
        Ok(match command {
            "guest-ping" => {
                info().await?;
                json!({})
            }
            "guest-sync" => {
                info().await?;
                arguments.get("id").cloned().unwrap_or_default()
            }
            "guest-info" => {
                let all: Vec<Value> = OWN
                    .iter()
                    .map(|name| json!({"name": name, "enabled": true, "success-response": !SILENT.contains(name)}))
                    .collect();
                json!({"version": text(&info().await?.program), "supported_commands": all})
            }
            "guest-get-osinfo" => {
                let info = info().await?;
                json!({
                    "name": text(&info.os), "version-id": text(&info.os_version),
                    "pretty-name": text(&info.pretty_name), "kernel-release": text(&info.kernel),
                })
            }
            "guest-get-host-name" => json!({"host-name": text(&info().await?.hostname)}),
            "guest-network-get-interfaces" => {
                let all = link.call::<message::Interfaces>(Request::Interfaces(Nothing {}), FIGURES).await?;
                let all = interfaces(all, |_| None).into_iter().map(|(name, i)| {
                    let addresses = i.addresses.iter().map(|(address, prefix, _)| {
                        let kind = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                        json!({"ip-address": address, "ip-address-type": kind, "prefix": prefix})
                    });
                    json!({
                        "name": name, "hardware-address": i.mac,
                        "ip-addresses": addresses.collect::<Vec<_>>(),
                    })
                });
                all.collect()
            }
            // For two minutes at most, whatever happens: Karst's agent sees to that.
            "guest-fsfreeze-freeze" => {
                self.freeze(Duration::from_millis(u64::from(message::MAX_FREEZE))).await?.into()
            }
            "guest-fsfreeze-thaw" => self.thaw().await?.into(),
            "guest-set-time" => {
                match arguments.get("time").and_then(Value::as_i64) {
                    None => self.set_time().await?,
                    Some(nanoseconds) => {
                        let time = message::Time { nanoseconds };
                        link.call::<Nothing>(Request::SetTime(time), limit).await?;
                    }
                }
                json!({})
            }
            "guest-shutdown" => {
                let reboot = arguments.get("mode").and_then(Value::as_str) == Some("reboot");
                let request = Request::Shutdown(message::Shutdown { reboot });
                link.call::<Nothing>(request, limit).await?;
                json!({})
            }
            other => {
                return Err(Error::unsupported(format!(
                    "{} needs the QEMU guest agent in the guest; install the package qemu-guest-agent there",
                    printable(other, 64)
                )));
            }
        })
    }
}

//! nftables: whole transactions in, JSON out (nft(8), libnftables-json(5)).

use crate::{
    exec::{Program, run},
    netlink::{Message, Socket, attributes},
};
use karst_model::{Error, Result};
use serde_json::Value;
use std::time::Duration;
use tokio::io::{Interest, unix::AsyncFd};

/// A ruleset of ten thousand rules (Kubernetes, big ipsets) has some MiB in JSON.
const LISTING_CAP: usize = 64 << 20;

/// Applies `transaction` (nft's own language) whole, or not at all.
///
/// # Errors
/// Unsupported when `nft` is missing; internal with nft's words.
pub async fn apply(transaction: &str) -> Result<()> {
    run(Program::Nft).args(["-f", "-"]).stdin(transaction).ok().await.map(drop)
}

/// All objects of the ruleset of this network namespace.
///
/// # Errors
/// As [`apply`].
pub async fn list_ruleset() -> Result<Vec<Value>> {
    let text = run(Program::Nft).args(["-j", "list", "ruleset"]).output_cap(LISTING_CAP).ok().await?;
    objects(&text)
}

/// All objects of one table; none when it is not there.
///
/// # Errors
/// As [`apply`].
pub async fn list_table(family: &str, name: &str) -> Result<Vec<Value>> {
    let out = run(Program::Nft)
        .args(["-j", "list", "table", family, name])
        .output_cap(LISTING_CAP)
        .output()
        .await?;
    if out.code != 0 && String::from_utf8_lossy(&out.stderr).contains("No such file") {
        return Ok(vec![]);
    }
    if out.code != 0 {
        return Err(Error::internal("nft could not list a table", String::from_utf8_lossy(&out.stderr)));
    }
    objects(&out.stdout)
}

/// All tables and chains, without their rules.
///
/// # Errors
/// As [`apply`].
pub async fn list_chains() -> Result<Vec<Value>> {
    let mut all = vec![];
    for what in ["tables", "chains"] {
        all.extend(objects(
            &run(Program::Nft).args(["-j", "list", what]).output_cap(LISTING_CAP).ok().await?,
        )?);
    }
    Ok(all)
}

/// Would the kernel take this transaction? Nothing is changed.
///
/// # Errors
/// Unsupported when `nft` is missing.
pub async fn accepts(transaction: &str) -> Result<bool> {
    Ok(run(Program::Nft).args(["-c", "-f", "-"]).stdin(transaction).output().await?.code == 0)
}

fn objects(text: &[u8]) -> Result<Vec<Value>> {
    let mut value: Value =
        serde_json::from_slice(text).map_err(|e| Error::internal("nft's answer could not be read", e))?;
    match value.get_mut("nftables").map(Value::take) {
        Some(Value::Array(objects)) => Ok(objects),
        _ => Err(Error::internal("nft's answer could not be read", "no array \"nftables\"")),
    }
}

/// Deletes a table if it is there.
///
/// # Errors
/// As [`apply`].
pub async fn delete_table(family: &str, name: &str) -> Result<()> {
    // `add` first makes the deletion succeed either way, in one transaction, also with an nft that has no `destroy`.
    apply(&format!("add table {family} {name}\ndelete table {family} {name}\n")).await
}

/// A number that changes with each change of the nftables ruleset of this network namespace (`NFT_MSG_GETGEN`): tells in
/// microseconds that nothing changed.
///
/// # Errors
/// Unsupported where the kernel has no nftables.
pub fn generation() -> Result<u32> {
    const NFT_MSG_GETGEN: u16 = 10 << 8 | 16;
    const NFTA_GEN_ID: u16 = 1;
    let answers = Socket::netfilter(0)
        .and_then(|mut s| s.query(Message::new(NFT_MSG_GETGEN, 0, &[0; 4])))
        .map_err(|e| Error::unsupported("this host's kernel has no nftables").with_context(e))?;
    answers
        .iter()
        .filter_map(|a| a.body.get(4..))
        .flat_map(attributes)
        .find(|(k, _)| *k == NFTA_GEN_ID)
        .and_then(|(_, v)| v.first_chunk::<4>().map(|b| u32::from_be_bytes(*b)))
        .ok_or_else(|| Error::internal("nftables gave no generation", format!("{answers:?}")))
}

/// Tells that somebody changed the ruleset.
#[derive(Debug)]
pub struct Watch(AsyncFd<Socket>);

impl Watch {
    /// Begins watching.
    ///
    /// # Errors
    /// Unsupported where the kernel has no nftables.
    pub fn new() -> Result<Self> {
        const NFNLGRP_NFTABLES: u32 = 7;
        let socket = Socket::netfilter(1 << (NFNLGRP_NFTABLES - 1))
            .map_err(|e| Error::unsupported("this host's kernel has no nftables").with_context(e))?;
        // SAFETY: `Socket` owns its descriptor and always names the same open one until it is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map_err(std::io::Error::from)?;
        Ok(Self(fd))
    }

    /// Waits for a change, and for `quiet` without another one after it (at most ten times as long).
    ///
    /// # Errors
    /// Internal.
    pub async fn changed(&mut self, quiet: Duration) -> Result<()> {
        self.once().await?;
        for _ in 0..10 {
            match tokio::time::timeout(quiet, self.once()).await {
                Err(_) => break,
                Ok(result) => result?,
            }
        }
        Ok(())
    }

    async fn once(&mut self) -> Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            let any = guard.get_inner().drain()?;
            guard.clear_ready();
            if any {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_taken_apart() {
        let listed =
            objects(br#"{"nftables":[{"metainfo":{"json_schema_version":1}},{"table":{"name":"x"}}]}"#)
                .unwrap();
        assert_eq!(listed[1]["table"]["name"], "x");
        assert!(objects(b"{}").is_err() && objects(b"").is_err());
    }
}

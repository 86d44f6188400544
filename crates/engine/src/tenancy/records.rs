//! The inventory's part of access: certificates, tokens, the server's configuration.

use crate::Row;
use karst_model::{
    Error, OperationId, PrincipalId, Result,
    trust::{ApiToken, Certificate, ServerConfig, TrustToken},
};
use karst_store::{Change, Record, Table};
use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr,
};

/// Records of access at one revision.
#[derive(Debug, Default)]
pub struct TenancyRecords {
    /// Certificates.
    pub certificates: BTreeMap<PrincipalId, Row<Certificate>>,
    by_fingerprint: HashMap<String, PrincipalId>,
    /// Trust tokens that were not used yet; they may have expired.
    pub trust_tokens: BTreeMap<OperationId, Row<TrustToken>>,
    /// API tokens; they may have expired.
    pub api_tokens: BTreeMap<PrincipalId, Row<ApiToken>>,
    /// The server's configuration, once it was changed.
    pub server: Option<Row<ServerConfig>>,
}

fn put<K: Ord + Copy + FromStr, T: Record>(map: &mut BTreeMap<K, Row<T>>, id: &str, change: &Change) {
    let Ok(key) = id.parse::<K>() else {
        tracing::error!(id, table = T::TABLE, "a key of the store is malformed");
        return;
    };
    match change {
        Change::Put(kv) => match Table::new().decode(kv) {
            Ok(row) => drop(map.insert(key, Row::new(row))),
            Err(e) => tracing::error!(key = %kv.key, error = ?e, "a record cannot be read"),
        },
        Change::Delete { .. } => drop(map.remove(&key)),
    }
}

impl TenancyRecords {
    /// Applies a change of `table`, when it is one of these.
    pub(crate) fn apply(&mut self, table: &str, id: &str, change: &Change) {
        match table {
            t if t == Certificate::TABLE => {
                put(&mut self.certificates, id, change);
                self.by_fingerprint =
                    self.certificates.values().map(|c| (c.fingerprint.clone(), c.id)).collect();
            }
            t if t == TrustToken::TABLE => put(&mut self.trust_tokens, id, change),
            t if t == ApiToken::TABLE => put(&mut self.api_tokens, id, change),
            t if t == ServerConfig::TABLE => match change {
                Change::Put(kv) => match Table::new().decode(kv) {
                    Ok(row) => self.server = Some(Row::new(row)),
                    Err(e) => tracing::error!(error = ?e, "the server's configuration cannot be read"),
                },
                Change::Delete { .. } => self.server = None,
            },
            _ => {}
        }
    }

    /// The trusted certificate with exactly this fingerprint.
    pub fn by_fingerprint(&self, fingerprint: &str) -> Option<&Row<Certificate>> {
        self.certificates.get(self.by_fingerprint.get(fingerprint)?)
    }

    /// A certificate by its fingerprint or a unique beginning of it (at least 4 digits).
    ///
    /// # Errors
    /// Not found, invalid when several begin so.
    pub fn certificate(&self, reference: &str) -> Result<&Row<Certificate>> {
        let lower = reference.to_ascii_lowercase();
        if let Some(row) = self.by_fingerprint(&lower) {
            return Ok(row);
        }
        let missing = || Error::not_found(format!("certificate {reference:?} not found"));
        if lower.len() < 4 {
            return Err(missing());
        }
        let mut found = self.certificates.values().filter(|c| c.fingerprint.starts_with(&lower));
        match (found.next(), found.next()) {
            (Some(row), None) => Ok(row),
            (Some(_), Some(_)) => Err(Error::invalid(
                "fingerprint",
                format!("{reference:?} is the beginning of several fingerprints; write more of it"),
            )),
            _ => Err(missing()),
        }
    }

    /// An API token by name.
    ///
    /// # Errors
    /// Not found.
    pub fn api_token(&self, name: &str) -> Result<&Row<ApiToken>> {
        self.api_tokens
            .values()
            .find(|t| t.name == name)
            .ok_or_else(|| Error::not_found(format!("token {name:?} not found")))
    }
}

//! `trust`: whose certificates the server trusts, and the tokens by which clients add theirs.

use serde_json::{Value, json};

use super::{
    completion::complete,
    object::{Object, parse_settings},
};
use crate::{
    client::{About, Kind, Url, operation::for_each},
    context::{Context, at},
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        yes_no,
    },
};

/// `trust ...`
#[derive(Debug, clap::Subcommand)]
pub enum Trust {
    /// List trusted certificates
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show a certificate as YAML
    Show {
        /// Its fingerprint, or the beginning of it
        #[arg(add = complete(Kind::Certificate))]
        fingerprint: String,
    },
    /// Set what can change of a certificate: name, description, restricted (true, false), projects (comma-separated), type
    Set {
        /// Its fingerprint, or the beginning of it
        #[arg(add = complete(Kind::Certificate))]
        fingerprint: String,
        /// Properties
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Change a certificate's entry in an editor, or replace it by YAML on stdin
    Edit {
        /// Its fingerprint, or the beginning of it
        #[arg(add = complete(Kind::Certificate))]
        fingerprint: String,
    },
    /// Make a token that lets one client have its certificate trusted, and print it; it cannot be shown again
    Add {
        /// Name of the client
        name: String,
        /// It sees these projects only
        #[arg(long, value_name = "PROJECT")]
        restricted_to: Vec<String>,
    },
    /// Trust the certificate in a file
    AddCertificate {
        /// The certificate, PEM
        file: std::path::PathBuf,
        /// Its name; that of the file if none
        #[arg(long)]
        name: Option<String>,
        /// It sees these projects only
        #[arg(long, value_name = "PROJECT")]
        restricted_to: Vec<String>,
        /// It reads metrics and nothing else
        #[arg(long)]
        metrics: bool,
    },
    /// Make a key and a certificate for a client of libvirt, trust it, and write what the client needs into a directory
    AddLibvirt {
        /// Name of the client
        name: String,
        /// Directory for cacert.pem, clientcert.pem and clientkey.pem, made if it is missing
        directory: std::path::PathBuf,
        /// It sees these projects only
        #[arg(long, value_name = "PROJECT")]
        restricted_to: Vec<String>,
    },
    /// Trust certificates no longer; their connections end
    #[command(visible_alias = "rm")]
    Remove {
        /// Their fingerprints, or the beginnings of them
        #[arg(required = true, add = complete(Kind::Certificate))]
        fingerprints: Vec<String>,
    },
}

/// A certificate as an object with fields.
fn object(fingerprint: &str) -> Object {
    Object {
        url: Url::new(&["certificates", fingerprint]),
        kind: Kind::Certificate,
        name: fingerprint.to_owned(),
        fields: &["name", "type", "restricted", "projects", "description"],
    }
}

impl Trust {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let path = |fingerprint: &str| Url::new(&["certificates", fingerprint]);
        match self {
            Self::List { format } => {
                let all = client.get(&Url::new(&["certificates"]).with("recursion", 1)).await?.metadata;
                let columns = &["NAME", "TYPE", "RESTRICTED", "PROJECTS", "FINGERPRINT", "DESCRIPTION"];
                let list = List::of(columns, all, |c| {
                    let projects = c["projects"].as_array().into_iter().flatten().map(output::scalar);
                    vec![
                        member(c, "name"),
                        member(c, "type"),
                        yes_no(c["restricted"] == true),
                        projects.collect::<Vec<_>>().join(" "),
                        member(c, "fingerprint").chars().take(12).collect(),
                        member(c, "description"),
                    ]
                });
                list.print(format.format)
            }
            Self::Show { fingerprint } => {
                let answer = client.get(&path(&fingerprint)).await;
                let answer = answer.about(client, Kind::Certificate, &fingerprint)?;
                output::print(&output::to_yaml(&answer.metadata)?)
            }
            Self::Set { fingerprint, keys } => {
                object(&fingerprint).set(context, parse_settings(&keys)?, true).await
            }
            Self::Edit { fingerprint } => object(&fingerprint).edit(context).await,
            Self::Add { name, restricted_to } => {
                let body = json!({"name": name, "type": "client", "token": true,
                    "restricted": !restricted_to.is_empty(), "projects": restricted_to});
                let answer = client.post(&Url::new(&["certificates"]), &body).await?;
                output::line(&token(&answer.metadata)?)
            }
            Self::AddCertificate { file, name, restricted_to, metrics } => {
                let text = std::fs::read_to_string(&file).map_err(|error| at(&file, &error))?;
                let stem = file.file_stem().map(|s| s.to_string_lossy().into_owned());
                let kind = if metrics { "metrics" } else { "client" };
                let body = json!({"name": name.or(stem).unwrap_or_default(), "type": kind, "certificate": text,
                    "restricted": !restricted_to.is_empty(), "projects": restricted_to});
                client.post(&Url::new(&["certificates"]), &body).await.map(drop)
            }
            Self::AddLibvirt { name, directory, restricted_to } => {
                let files = Pki::create(&directory)?;
                let body =
                    json!({"name": name, "restricted": !restricted_to.is_empty(), "projects": restricted_to});
                match client.post(&Url::new(&["karst", "libvirt", "clients"]), &body).await {
                    Ok(answer) => files.fill(&answer.metadata),
                    Err(e) => {
                        files.remove();
                        Err(e)
                    }
                }
            }
            Self::Remove { fingerprints } => {
                for_each(&fingerprints, |fingerprint| async move {
                    let answer = client.delete(&path(&fingerprint)).await;
                    answer.about(client, Kind::Certificate, &fingerprint).map(drop)
                })
                .await
            }
        }
    }
}

/// The files of a client of libvirt (`?pkipath=DIRECTORY`), and the member of the server's answer that each is of.
const PKI: [(&str, &str); 3] =
    [("cacert.pem", "certificate_authority"), ("clientcert.pem", "certificate"), ("clientkey.pem", "key")];

/// They are made before the server is asked: a key that could not be written would be lost.
struct Pki(Vec<(std::path::PathBuf, std::fs::File)>);

impl Pki {
    fn create(directory: &std::path::Path) -> Result<Self> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| at(directory, &error))?;
        let mut files = Self(vec![]);
        for (name, _) in PKI {
            let path = directory.join(name);
            match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(file) => files.0.push((path, file)),
                Err(error) => {
                    files.remove();
                    return Err(at(&path, &error));
                }
            }
        }
        Ok(files)
    }

    fn fill(mut self, answer: &Value) -> Result<()> {
        use std::io::Write;
        for ((path, file), (_, member_of)) in self.0.iter_mut().zip(PKI) {
            let written = file.write_all(member(answer, member_of).as_bytes()).and_then(|()| file.sync_all());
            written.map_err(|error| at(path, &error))?;
        }
        Ok(())
    }

    fn remove(self) {
        for (path, _) in self.0 {
            // Empty files that nobody asked for: what stays of them is seen.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The token of an operation, as clients expect it: base64 of what the operation says.
fn token(operation: &Value) -> Result<String> {
    let said = &operation["metadata"];
    let secret = said["secret"].as_str().filter(|s| !s.is_empty());
    let secret = secret.ok_or_else(|| Error::local("the server answers without a token"))?;
    let text = json!({
        "client_name": said["request"]["name"], "fingerprint": said["fingerprint"], "addresses": said["addresses"],
        "secret": secret, "expires_at": said.get("expiresAt").cloned().unwrap_or_else(|| json!("0001-01-01T00:00:00Z")),
    });
    Ok(base64(text.to_string().as_bytes()))
}

fn base64(data: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
    for three in data.chunks(3) {
        let n = three.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let digit = DIGITS[(n >> (18 - 6 * i) & 63) as usize];
            out.push(if i > three.len() { '=' } else { char::from(digit) });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_libvirt_replace_none() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/pki");
        let answer = json!({"certificate_authority": "A", "certificate": "B", "key": "C"});
        Pki::create(&inner).unwrap().fill(&answer).unwrap();
        let read = |name: &str| std::fs::read_to_string(inner.join(name)).unwrap();
        assert_eq!(PKI.map(|(name, _)| read(name)), ["A", "B", "C"]);
        let mode = std::fs::metadata(inner.join("clientkey.pem")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::remove_file(inner.join("cacert.pem")).unwrap();
        assert!(Pki::create(&inner).is_err());
        assert!(!inner.join("cacert.pem").exists(), "what was begun is gone");
        assert_eq!(read("clientkey.pem"), "C");
    }

    #[test]
    fn tokens_are_base64() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("\u{ff}\u{fe}", "w7/Dvg=="),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        let operation = json!({"metadata": {"secret": "s", "fingerprint": "f", "addresses": ["a"], "request": {"name": "n"}}});
        assert!(token(&operation).unwrap().len() > 40);
        assert!(token(&json!({"metadata": {"secret": ""}})).is_err());
    }
}

//! Encryption of disks: LUKS of the first version, as QEMU makes and opens it. What a container of it is made with, how long what
//! stands before its content is, and the passphrase on its way to a host.
//!
//! A *container* is a raw disk: its header, then the content, encrypted. The size that users say and machines see is the content's.

use crate::{Config, Error, Result, error::nearest};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{collections::BTreeMap, fmt};
use uuid::Uuid;

/// Key of volumes and of disks: the UUID of the secret whose value opens it.
pub const SECRET: &str = "encryption.secret";
/// Key of volumes: cipher and mode.
pub const CIPHER: &str = "encryption.cipher";
/// Key of volumes: the hash that passphrases go through.
pub const HASH: &str = "encryption.hash";
/// Key of volumes: where the initial vectors of sectors come from.
pub const IV: &str = "encryption.iv";

/// Keys of a volume that say how its container was made, which cannot be changed afterwards.
pub const MADE_WITH: &[&str] = &[CIPHER, HASH, IV];

macro_rules! words {
    ($(#[$doc:meta])* $name:ident $what:literal { $($(#[$of:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $( $(#[$of])* #[serde(rename = $word)] $variant, )+ }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// QEMU's word for it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// By QEMU's word.
            ///
            /// # Errors
            /// Invalid, naming the field and the nearest word.
            pub fn parse(field: &str, text: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|one| one.as_str() == text).ok_or_else(|| {
                    let known = Self::ALL.iter().map(|one| one.as_str());
                    let hint = nearest(text, known.clone())
                        .map_or_else(|| known.collect::<Vec<_>>().join(", "), str::to_owned);
                    Error::invalid(field, format!("{text:?} is not {} of disks here; {hint} is there", $what))
                })
            }
        }
    };
}

words! {
    /// A cipher with the length of its key. Which of them a host has is its QEMU's matter; AES it always has.
    Cipher "a cipher" {
        /// AES.
        Aes128 = "aes-128",
        /// AES.
        Aes192 = "aes-192",
        /// AES.
        Aes256 = "aes-256",
        /// Serpent.
        Serpent128 = "serpent-128",
        /// Serpent.
        Serpent192 = "serpent-192",
        /// Serpent.
        Serpent256 = "serpent-256",
        /// Twofish.
        Twofish128 = "twofish-128",
        /// Twofish.
        Twofish192 = "twofish-192",
        /// Twofish.
        Twofish256 = "twofish-256",
    }
}

words! {
    /// How a cipher is used on a sector.
    Mode "a mode of ciphers" {
        /// Two keys, made for disks.
        Xts = "xts",
        /// Chained blocks.
        Cbc = "cbc",
    }
}

words! {
    /// Where the initial vector of a sector comes from.
    Iv "a source of initial vectors" {
        /// Its number, 32 bits of it.
        Plain = "plain",
        /// Its number.
        Plain64 = "plain64",
        /// Its number, encrypted with the key's hash (SHA-256).
        Essiv = "essiv",
    }
}

words! {
    /// What a passphrase goes through.
    Hash "a hash" {
        /// SHA-1.
        Sha1 = "sha1",
        /// SHA-2.
        Sha224 = "sha224",
        /// SHA-2.
        Sha256 = "sha256",
        /// SHA-2.
        Sha384 = "sha384",
        /// SHA-2.
        Sha512 = "sha512",
        /// RIPEMD.
        Ripemd160 = "ripemd160",
    }
}

impl Cipher {
    /// Bytes of its key.
    fn key(self) -> u64 {
        match self {
            Self::Aes128 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }
}

/// What a container is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// Cipher.
    pub cipher: Cipher,
    /// Its mode.
    pub mode: Mode,
    /// Initial vectors.
    pub iv: Iv,
    /// Hash.
    pub hash: Hash,
}

impl Default for Encryption {
    /// What QEMU and libvirt take where nothing is said.
    fn default() -> Self {
        Self { cipher: Cipher::Aes256, mode: Mode::Xts, iv: Iv::Plain64, hash: Hash::Sha256 }
    }
}

/// The key's value, if there is one.
fn value<'a>(config: &'a Config, key: &str) -> Option<&'a str> {
    config.get(key).map(String::as_str).filter(|v| !v.is_empty())
}

/// The UUID of a secret, as a key says it.
///
/// # Errors
/// Invalid, naming the field.
pub fn parse_secret(field: &str, text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| {
        Error::invalid(
            field,
            format!("{text:?} is not the UUID of a secret; karst secret list shows those of the project"),
        )
    })
}

impl Encryption {
    /// Of a volume's configuration, with the secret that opens it; `None` when it is not encrypted.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn of(config: &Config) -> Result<Option<(Uuid, Self)>> {
        let Some(secret) = value(config, SECRET) else {
            return match MADE_WITH.iter().find(|key| value(config, key).is_some()) {
                None => Ok(None),
                Some(key) => Err(Error::invalid(
                    format!("config.{key}"),
                    format!("is said of encrypted volumes; name the secret too ({SECRET})"),
                )),
            };
        };
        let secret = parse_secret(&format!("config.{SECRET}"), secret)?;
        let mut made = Self::default();
        if let Some(text) = value(config, CIPHER) {
            let field = format!("config.{CIPHER}");
            let (cipher, mode) =
                text.rsplit_once('-').filter(|(cipher, _)| cipher.contains('-')).ok_or_else(|| {
                    Error::invalid(
                        &field,
                        format!(
                            "{text:?} is not a cipher with its key's length and its mode, such as aes-256-xts"
                        ),
                    )
                })?;
            made.cipher = Cipher::parse(&field, cipher)?;
            made.mode = Mode::parse(&field, mode)?;
        }
        if let Some(text) = value(config, IV) {
            made.iv = Iv::parse(&format!("config.{IV}"), text)?;
        }
        if let Some(text) = value(config, HASH) {
            made.hash = Hash::parse(&format!("config.{HASH}"), text)?;
        }
        Ok(Some((secret, made)))
    }

    /// As the keys of a volume say it, without the secret; what is usual is not said.
    pub fn keys(self) -> Config {
        let usual = Self::default();
        let mut keys = Config::new();
        if (self.cipher, self.mode) != (usual.cipher, usual.mode) {
            keys.insert(CIPHER.into(), format!("{}-{}", self.cipher.as_str(), self.mode.as_str()));
        }
        if self.iv != usual.iv {
            keys.insert(IV.into(), self.iv.as_str().into());
        }
        if self.hash != usual.hash {
            keys.insert(HASH.into(), self.hash.as_str().into());
        }
        keys
    }

    /// Bytes that stand before the content: a page, and eight places for the key, each spread over 4,000 stripes and then whole
    /// pages. Source: the LUKS on-disk format 1.2.3, QEMU's `crypto/block-luks.c`.
    pub fn header(self) -> u64 {
        const PAGE: u64 = 4096;
        const STRIPES: u64 = 4000;
        const PLACES: u64 = 8;
        let key = self.cipher.key() * if self.mode == Mode::Xts { 2 } else { 1 };
        PAGE + PLACES * (key * STRIPES).next_multiple_of(PAGE)
    }

    /// The options of `qemu-img create -f luks`, but for the secret.
    pub fn options(self) -> String {
        let mut all = format!(
            "cipher-alg={},cipher-mode={},hash-alg={},ivgen-alg={}",
            self.cipher.as_str(),
            self.mode.as_str(),
            self.hash.as_str(),
            self.iv.as_str()
        );
        if self.iv == Iv::Essiv {
            all.push_str(",ivgen-hash-alg=sha256");
        }
        all
    }
}

/// A passphrase in clear. It is not shown, and overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(String);

impl Passphrase {
    /// Of a secret's value.
    ///
    /// # Errors
    /// Invalid, without a field, when QEMU would not take it: it is text, of at least one letter, without NUL.
    pub fn of(value: &[u8]) -> Result<Self> {
        let bad = |why: &str| Error::new(crate::ErrorKind::Invalid, format!("the value of the secret {why}"));
        let text = std::str::from_utf8(value)
            .map_err(|_| bad("is not text (UTF-8), which a passphrase of a disk has to be"))?;
        match text {
            "" => Err(bad("is empty, and no passphrase of a disk")),
            _ if text.contains('\0') => Err(bad("holds a NUL byte, which a passphrase of a disk cannot")),
            _ => Ok(Self(text.to_owned())),
        }
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

impl Drop for Passphrase {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        // Nobody reads it any more, which a compiler takes for a reason not to write it.
        std::hint::black_box(&bytes);
    }
}

impl Serialize for Passphrase {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Passphrase {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = Self(String::deserialize(deserializer)?);
        Self::of(text.0.as_bytes()).map_err(de::Error::custom)
    }
}

/// Passphrases by the secrets that they are the values of.
pub type Passphrases = BTreeMap<Uuid, Passphrase>;

#[cfg(test)]
mod tests {
    use super::*;

    fn config(keys: &[(&str, &str)]) -> Config {
        keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    const UUID: &str = "a2b1c0d9-0000-4000-8000-000000000001";

    #[test]
    fn keys_say_how_a_container_is_made() {
        assert_eq!(Encryption::of(&config(&[("size", "1GiB"), (SECRET, "")])).unwrap(), None);
        let (secret, usual) = Encryption::of(&config(&[(SECRET, UUID)])).unwrap().unwrap();
        assert_eq!((secret.to_string().as_str(), usual), (UUID, Encryption::default()));
        assert!(usual.keys().is_empty());
        let odd = config(&[(SECRET, UUID), (CIPHER, "serpent-128-cbc"), (IV, "essiv"), (HASH, "sha512")]);
        let (_, made) = Encryption::of(&odd).unwrap().unwrap();
        assert_eq!(
            made.options(),
            "cipher-alg=serpent-128,cipher-mode=cbc,hash-alg=sha512,ivgen-alg=essiv,ivgen-hash-alg=sha256"
        );
        let mut keys = made.keys();
        keys.insert(SECRET.into(), UUID.into());
        assert_eq!(keys, odd);
        for (bad, field, word) in [
            (config(&[(SECRET, "mine")]), "config.encryption.secret", "mine"),
            (config(&[(CIPHER, "aes-256-xts")]), "config.encryption.cipher", "secret"),
            (config(&[(SECRET, UUID), (CIPHER, "aes")]), "config.encryption.cipher", "aes-256-xts"),
            (config(&[(SECRET, UUID), (CIPHER, "ase-256-xts")]), "config.encryption.cipher", "aes-256"),
            (config(&[(SECRET, UUID), (CIPHER, "aes-256-ecb")]), "config.encryption.cipher", "ecb"),
            (config(&[(SECRET, UUID), (IV, "essiv:sha256")]), "config.encryption.iv", "essiv"),
            (config(&[(SECRET, UUID), (HASH, "md5")]), "config.encryption.hash", "md5"),
        ] {
            let e = Encryption::of(&bad).unwrap_err();
            assert!(e.field.as_deref() == Some(field) && e.message.contains(word), "{bad:?}: {e}");
        }
    }

    #[test]
    fn headers_are_as_long_as_qemus() {
        // As `qemu-img info` says of what it made (payload offset).
        assert_eq!(Encryption::default().header(), 2_068_480);
        let short = Encryption { mode: Mode::Cbc, ..Encryption::default() };
        assert_eq!(short.header(), 1_052_672);
    }

    #[test]
    fn passphrases_are_text_and_not_shown() {
        let good = Passphrase::of("pä55 wörd".as_bytes()).unwrap();
        assert_eq!((good.text(), format!("{good:?}").as_str()), ("pä55 wörd", "Passphrase(..)"));
        let wire = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<Passphrase>(&wire).unwrap(), good);
        for bad in [&b""[..], b"a\0b", b"\xff\xfe"] {
            let e = Passphrase::of(bad).unwrap_err();
            assert!(e.is(crate::ErrorKind::Invalid) && e.message.contains("secret"), "{e}");
        }
        assert!(serde_json::from_str::<Passphrase>("\"\"").is_err());
    }
}

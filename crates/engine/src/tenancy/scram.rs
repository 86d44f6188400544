//! Logins by SCRAM-SHA-256 (RFC 5802, RFC 7677), for protocols without headers: the user is an API token's name, the password
//! the token. It never crosses the wire, and what is recorded does not give it back.
//!
//! Channel binding is not offered: the connection is TLS whose server the client has verified. Of a name that nobody has
//! the exchange goes on to its end like any other, and fails there.

use super::trust::{hex, random_secret, same};
use crate::Engine;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use karst_model::{
    Error, PrincipalId, Result,
    access::{Identity, Principal},
    trust::Scram,
};
use ring::{digest, hmac, pbkdf2};
use std::{num::NonZeroU32, sync::OnceLock};

/// The mechanism's name.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// The least that RFC 7677 allows. More is against guessing, and a token's 256 random bits are not guessed.
const ITERATIONS: NonZeroU32 = NonZeroU32::new(4096).unwrap();
/// Longest message of a client, and its longest nonce.
const LONGEST: usize = 2048;
const NONCE: usize = 512;
const KEY: usize = digest::SHA256_OUTPUT_LEN;

type Key = [u8; KEY];

/// Salts of names that nobody has: the same each time, as those of others are.
#[derive(Default)]
pub(crate) struct Unknown(OnceLock<Key>);

/// An exchange whose client has been asked for its proof.
pub struct Exchange {
    /// The token, if there is one of this name.
    id: Option<PrincipalId>,
    stored_key: Key,
    server_key: Key,
    /// As the client said it: it says it again, encoded.
    header: String,
    /// Both sides' nonces.
    nonce: String,
    /// The two first messages.
    said: String,
}

fn refused() -> Error {
    Error::unauthenticated("the user or the password is wrong")
}

fn sign(key: &[u8], text: &[u8]) -> Key {
    let mut out = [0; KEY];
    out.copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text).as_ref());
    out
}

fn hash(key: &[u8]) -> Key {
    let mut out = [0; KEY];
    out.copy_from_slice(digest::digest(&digest::SHA256, key).as_ref());
    out
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |p: &[u8]| u8::from_str_radix(std::str::from_utf8(p).ok()?, 16).ok();
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(pair).collect())?
}

/// What is kept of a password.
pub(crate) fn verifier(password: &str, salt: &[u8]) -> Scram {
    let mut salted = [0; KEY];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, salt, password.as_bytes(), &mut salted);
    Scram {
        salt: hex(salt),
        iterations: ITERATIONS.get(),
        stored_key: hex(&hash(&sign(&salted, b"Client Key"))),
        server_key: hex(&sign(&salted, b"Server Key")),
    }
}

/// The first message of a client: header, what follows it, user, nonce.
fn parse_first(message: &[u8]) -> Option<(String, String, String, String)> {
    let text = std::str::from_utf8(message).ok().filter(|t| t.len() <= LONGEST)?;
    // No channel binding, or one that the client could and believes that the server cannot; acting for nobody else.
    let bare = text.strip_prefix("n,,").or_else(|| text.strip_prefix("y,,"))?;
    let mut parts = bare.split(',');
    let user = parts.next()?.strip_prefix("n=")?;
    let nonce = parts.next()?.strip_prefix("r=")?;
    // Mandatory extensions come first and are not known; others say nothing here.
    let printable = nonce.bytes().all(|b| (0x21..=0x7e).contains(&b));
    if nonce.is_empty() || nonce.len() > NONCE || !printable {
        return None;
    }
    let mut name = String::new();
    let mut rest = user;
    while let Some((before, after)) = rest.split_once('=') {
        name.push_str(before);
        name.push(match after.get(..2)? {
            "2C" => ',',
            "3D" => '=',
            _ => return None,
        });
        rest = &after[2..];
    }
    name.push_str(rest);
    (!name.is_empty()).then(|| (text[..3].to_owned(), bare.to_owned(), name, nonce.to_owned()))
}

/// Begins an exchange over what is kept; answers it with the message for the client.
fn begin(
    first: &[u8],
    own: &str,
    find: impl FnOnce(&str) -> (Option<PrincipalId>, Scram),
) -> Option<(Exchange, Vec<u8>)> {
    let (header, bare, name, theirs) = parse_first(first)?;
    let (id, scram) = find(&name);
    let key = |text: &str| Key::try_from(unhex(text)?).ok();
    let salt = BASE64_STANDARD.encode(unhex(&scram.salt)?);
    let nonce = format!("{theirs}{own}");
    let message = format!("r={nonce},s={salt},i={}", scram.iterations);
    let exchange = Exchange {
        id,
        stored_key: key(&scram.stored_key)?,
        server_key: key(&scram.server_key)?,
        header,
        said: format!("{bare},{message}"),
        nonce,
    };
    Some((exchange, message.into_bytes()))
}

impl Exchange {
    /// Checks a client's proof; answers with the server's own, and whose it was.
    fn finish(self, last: &[u8]) -> Option<(PrincipalId, Vec<u8>)> {
        let text = std::str::from_utf8(last).ok().filter(|t| t.len() <= LONGEST)?;
        let (without, proof) = text.rsplit_once(",p=")?;
        let mut parts = without.split(',');
        let binding = BASE64_STANDARD.decode(parts.next()?.strip_prefix("c=")?).ok()?;
        let nonce = parts.next()?.strip_prefix("r=")?;
        let proof = Key::try_from(BASE64_STANDARD.decode(proof).ok()?).ok()?;
        let said = format!("{},{without}", self.said);
        let signature = sign(&self.stored_key, said.as_bytes());
        let mut client_key = [0; KEY];
        client_key.iter_mut().zip(proof.iter().zip(signature)).for_each(|(key, (p, s))| *key = p ^ s);
        let proven = same(&hex(&hash(&client_key)), &hex(&self.stored_key));
        let meant = binding == self.header.as_bytes() && nonce == self.nonce;
        let id = self.id.filter(|_| proven && meant)?;
        let answer = format!("v={}", BASE64_STANDARD.encode(sign(&self.server_key, said.as_bytes())));
        Some((id, answer.into_bytes()))
    }
}

impl Engine {
    /// Could anybody log in so?
    pub fn scram_offered(&self) -> bool {
        let now = self.inner().env.now();
        let records = self.inner().inventory.read();
        let mut tokens = records.tenancy.api_tokens.values();
        tokens.any(|t| t.scram.is_some() && t.expires_at.is_none_or(|at| at > now))
    }

    /// Begins a login with the client's first message; answers the server's.
    ///
    /// # Errors
    /// Unauthenticated for what is no such message.
    pub fn scram_begin(&self, first: &[u8]) -> Result<(Exchange, Vec<u8>)> {
        let own = random_secret(self);
        let find = |name: &str| {
            let now = self.inner().env.now();
            let records = self.inner().inventory.read();
            let row = records.tenancy.api_token(name).ok();
            let row = row.filter(|t| t.expires_at.is_none_or(|at| at > now));
            let known = row.and_then(|t| Some((Some(t.id), t.scram.clone()?)));
            known.unwrap_or_else(|| {
                let key = self.inner().scram.0.get_or_init(|| {
                    let mut key = [0; KEY];
                    self.inner().env.fill_random(&mut key);
                    key
                });
                let salt = sign(key, name.as_bytes());
                (
                    None,
                    Scram {
                        salt: hex(&salt[..16]),
                        iterations: ITERATIONS.get(),
                        stored_key: hex(key),
                        server_key: hex(key),
                    },
                )
            })
        };
        begin(first, &own, find).ok_or_else(refused)
    }

    /// Ends a login with the client's last message; answers who it is, and the server's last.
    ///
    /// # Errors
    /// Unauthenticated, without saying what was wrong.
    pub fn scram_finish(
        &self,
        exchange: Exchange,
        last: &[u8],
        address: &str,
    ) -> Result<(Principal, Vec<u8>)> {
        let (id, answer) = exchange.finish(last).ok_or_else(refused)?;
        let now = self.inner().env.now();
        let records = self.inner().inventory.read();
        let row = records.tenancy.api_tokens.get(&id).ok_or_else(refused)?;
        if row.expires_at.is_some_and(|at| at <= now) {
            return Err(refused());
        }
        let identity = Identity::Token { name: row.name.clone(), address: address.to_owned() };
        Ok((Principal::of(row.id, identity, row.grants.clone()), answer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &[u8] = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const OWN: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";

    fn kept() -> Scram {
        verifier("pencil", &BASE64_STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap())
    }

    fn id() -> PrincipalId {
        PrincipalId(uuid::Uuid::from_u128(7))
    }

    fn exchange() -> Exchange {
        begin(FIRST, OWN, |name| (Some(id()).filter(|_| name == "user"), kept())).unwrap().0
    }

    #[test]
    fn the_exchange_of_rfc_7677() {
        let (exchange, said) = begin(FIRST, OWN, |_| (Some(id()), kept())).unwrap();
        let nonce = format!("rOprNGfwEbeRWgbNEkqO{OWN}");
        assert_eq!(said, format!("r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096").into_bytes());
        let last = format!("c=biws,r={nonce},p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
        let (of, said) = exchange.finish(last.as_bytes()).unwrap();
        assert_eq!((of, said), (id(), b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=".to_vec()));
    }

    #[test]
    fn what_is_no_proof_is_refused() {
        let nonce = format!("rOprNGfwEbeRWgbNEkqO{OWN}");
        let proof = "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        let zeros = BASE64_STANDARD.encode([0; 32]);
        for wrong in [
            String::new(),
            format!("c=biws,r={nonce}"),
            format!("c=biws,r={nonce},p="),
            format!("c=biws,r={nonce},p={zeros}"),
            format!("c=eSws,r={nonce},p={proof}"),
            format!("c=biws,r={nonce}x,p={proof}"),
            format!("c=biws,r={nonce},x=1,p={proof}"),
            format!("r={nonce},c=biws,p={proof}"),
        ] {
            assert!(exchange().finish(wrong.as_bytes()).is_none(), "{wrong}");
        }
        // The same proof of a name that nobody has.
        let (unknown, _) = begin(FIRST, OWN, |_| (None, kept())).unwrap();
        assert!(unknown.finish(format!("c=biws,r={nonce},p={proof}").as_bytes()).is_none());
    }

    #[test]
    fn first_messages() {
        let name = |text: &str| parse_first(text.as_bytes()).map(|(_, _, name, _)| name);
        assert_eq!(name("n,,n=a=2Cb=3D,r=x").as_deref(), Some("a,b="));
        assert_eq!(name("y,,n=a,r=x,x=1").as_deref(), Some("a"));
        for wrong in [
            "",
            "n,,",
            "p=tls-unique,,n=a,r=x",
            "n,a=b,n=a,r=x",
            "n,,n=,r=x",
            "n,,n=a,r=",
            "n,,n=a=2,r=x",
            "n,,n=a=ü,r=x",
            "n,,m=1,n=a,r=x",
            "n,,n=a,r=a b",
        ] {
            assert!(name(wrong).is_none(), "{wrong}");
        }
        assert!(parse_first(&[0xff; 10]).is_none() && parse_first(&vec![b'n'; LONGEST + 1]).is_none());
    }
}

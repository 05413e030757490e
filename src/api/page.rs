//! Pages: how many, and from where on.
//!
//! A token is the place where the last page ended and a hash of the question it
//! belongs to, so that it can't be used with another one.

use sha2::{Digest as _, Sha256};

use super::fields::Fields;

/// Items of a page where nothing is said.
const DEFAULT: i32 = 50;
/// Most items of a page.
const MOST: i32 = 1_000;
/// Bytes of the hash that a token keeps.
const HASH: usize = 8;

/// A page that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// At most so many items.
    pub limit: usize,
    /// Where the page before ended; nothing for the first page.
    pub after: Option<String>,
    hash: [u8; HASH],
}

impl Page {
    /// Reads size and token. `question` is everything else that was asked, with
    /// the tenant.
    pub fn parse(fields: &mut Fields, size: i32, token: &str, question: &str) -> Self {
        if size < 0 {
            fields.bad("page_size", "0 or more");
        }
        let size = if size == 0 { DEFAULT } else { size.min(MOST) };
        let mut hash = [0; HASH];
        hash.copy_from_slice(&Sha256::digest(question)[..HASH]);
        let mut after = None;
        if !token.is_empty() {
            after = place(token, hash);
            if after.is_none() {
                fields.bad(
                    "page_token",
                    "a next_page_token of the same question, or empty",
                );
            }
        }
        Self {
            limit: usize::try_from(size).unwrap_or(0),
            after,
            hash,
        }
    }

    /// How many to read: one more than is sent, to know whether there is more.
    pub fn fetch(&self) -> i64 {
        i64::try_from(self.limit + 1).unwrap_or(i64::MAX)
    }

    /// Cuts what was read to the page, and makes the token of the next one.
    pub fn cut<T>(&self, mut items: Vec<T>, place: impl FnOnce(&T) -> String) -> (Vec<T>, String) {
        if items.len() <= self.limit {
            return (items, String::new());
        }
        items.truncate(self.limit);
        let token = items.last().map(|last| self.token(&place(last)));
        (items, token.unwrap_or_default())
    }

    /// The token of the page that begins after a place.
    pub fn token(&self, place: &str) -> String {
        let check = Sha256::new()
            .chain_update(self.hash)
            .chain_update(place)
            .finalize();
        format!("{}{}", hex::encode(&check[..HASH]), hex::encode(place))
    }
}

/// The place in a token, if it is one of this question.
fn place(token: &str, hash: [u8; HASH]) -> Option<String> {
    let bytes = hex::decode(token).ok()?;
    let (check, place) = bytes.split_at_checked(HASH)?;
    let expected = Sha256::new()
        .chain_update(hash)
        .chain_update(place)
        .finalize();
    if expected[..HASH] != *check {
        return None;
    }
    String::from_utf8(place.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(token: &str, question: &str) -> Result<Page, tonic::Status> {
        let mut fields = Fields::default();
        let page = Page::parse(&mut fields, 2, token, question);
        fields.finish(Some(page))
    }

    #[test]
    fn a_token_leads_to_the_next_page_of_the_same_question_only() {
        let first = page("", "acme").expect("a page");
        let (items, token) = first.cut(vec![1, 2, 3], |last| last.to_string());
        assert_eq!(items, [1, 2]);
        assert_eq!(
            page(&token, "acme").expect("a page").after.as_deref(),
            Some("2")
        );
        assert!(page(&token, "other").is_err());
        assert!(page("zz", "acme").is_err());
        assert!(page(&format!("{token}00"), "acme").is_err());
    }

    #[test]
    fn the_last_page_has_no_token() {
        let (items, token) = page("", "q")
            .expect("a page")
            .cut(vec![1, 2], i32::to_string);
        assert_eq!((items.len(), token.as_str()), (2, ""));
    }
}

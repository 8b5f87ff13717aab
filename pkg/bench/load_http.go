package bench

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"time"
)

// get asks a web server once. What does not answer is a failure, not an error:
// the caller may try again.
func get(j job) (out reply) {
	answer, err := ask(j.Addr.String())
	if err != nil {
		out.Failed, out.Failure = 1, err.Error()
		return out
	}
	if answer.Header.Get(via) != "" {
		out.Done = 1
	}
	return out
}

func ask(address string) (*http.Response, error) {
	conn, err := net.DialTimeout("tcp4", address, time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: far\r\nConnection: close\r\n\r\n"); err != nil {
		return nil, err
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %s", answer.Status)
	}
	return answer, answer.Body.Close()
}
